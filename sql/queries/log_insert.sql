-- Adds a piece to the log of an attempt.
-- $1 bigint build  $2 integer attempt  $3 bigint seq  $4 text content  $5 bigint position  $6 bigint left_out, or null
INSERT INTO farm.build_log (build_id, attempt, seq, content, position, left_out) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (build_id, attempt, seq) DO UPDATE
SET content = excluded.content, position = excluded.position, left_out = excluded.left_out, written_at = clock_timestamp()
