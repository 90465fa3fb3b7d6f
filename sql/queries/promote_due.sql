-- Makes rows ready whose run_after has come. Trigger build_queue_update computes ready.
-- $1 integer  at most this many
-- Locks: those rows, for the length of this statement; rows that another worker promotes are skipped.
UPDATE farm.build_queue SET ready = true
WHERE build_id IN (
    SELECT build_id FROM farm.build_queue WHERE NOT ready AND needs = '{}' AND run_after <= clock_timestamp()
    ORDER BY run_after LIMIT $1 FOR UPDATE SKIP LOCKED
)
