-- Why begin_attempt.sql began nothing: `held` with the name of who holds the row in builds, or null: the builder does not allow it, or the
-- build does not wait any more.
-- $1 bigint  build
-- Locks: the builds row, for the length of this statement; waits for nobody.
WITH waiting AS MATERIALIZED (
    SELECT b.id FROM farm.builds b WHERE b.id = $1 AND b.state IN ('described', 'queued')
), free AS MATERIALIZED (
    SELECT b.id FROM farm.builds b WHERE b.id = $1 FOR NO KEY UPDATE SKIP LOCKED
)
SELECT CASE WHEN NOT EXISTS (SELECT FROM free) THEN farm.build_holder(w.id) END AS held FROM waiting w
