-- Adds a piece to the log of an attempt.
-- $1 bigint build  $2 integer attempt  $3 bigint seq  $4 text content
INSERT INTO build_log (build_id, attempt, seq, content) VALUES ($1, $2, $3, $4)
ON CONFLICT (build_id, attempt, seq) DO UPDATE SET content = excluded.content, written_at = clock_timestamp()
