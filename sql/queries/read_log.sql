-- The next pieces of a log, in order.
-- $1 bigint  build    $2 integer  attempt    $3 bigint  after this seq    $4 bigint  at most this many pieces
SELECT seq, content FROM farm.build_log WHERE build_id = $1 AND attempt = $2 AND seq > $3 ORDER BY seq LIMIT $4
