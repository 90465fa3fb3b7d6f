-- Takes one free slot of a builder, for the length of the claim's transaction, and leaves word of it for claim_row.sql.
-- $1 integer  builders.number
-- $2 integer  builders.max_running
-- $3 integer[]  slots of running builds whose claim is lost at the moment: not free, though nobody holds their lock
-- Locks: one advisory transaction lock ($1, slot). The cap holds over all workers because the slots are locks, not counters.
SELECT slot, set_config('buildreactor.slot', slot::text, true)
FROM (SELECT slot FROM generate_series(1, $2) AS slot WHERE slot <> ALL ($3) AND pg_try_advisory_xact_lock($1, slot) LIMIT 1) s
