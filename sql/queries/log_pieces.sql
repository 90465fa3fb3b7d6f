-- What an earlier daemon has written of a log.
-- $1 bigint  build    $2 integer  attempt
SELECT seq, position, left_out, octet_length(content)::bigint AS size FROM farm.build_log
WHERE build_id = $1 AND attempt = $2 AND position IS NOT NULL ORDER BY seq
