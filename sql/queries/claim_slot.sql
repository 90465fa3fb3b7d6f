-- Takes one free slot of a builder and one unit of each of its locks, for the length of the claim's transaction, and leaves word
-- of success for claim_row.sql.
-- $1 integer  first key of the builder's slots    $7 integer  second key of slot 0
-- $2 integer  builders.max_running
-- $3 integer[]  slots of running builds whose claim is lost at the moment: not free, though nobody holds their lock
-- $4 integer[]  first keys of its build_locks    $5 integer[]  their capacities    $6 text[]  their names    $8 integer  second key of unit 0
-- Locks: advisory transaction locks ($1, $7 + slot) and ($4, $8 + unit), all of them tried and none waited for, so there is no
-- deadlock. The caps hold over all workers because they are locks, not counters.
WITH slot AS MATERIALIZED (
    SELECT slot FROM generate_series(1, $2) AS slot WHERE slot <> ALL ($3) AND pg_try_advisory_xact_lock($1, $7 + slot) LIMIT 1
), units AS MATERIALIZED (
    SELECT l.name || '#' || u.unit AS unit
    FROM slot CROSS JOIN unnest($4::integer[], $5::integer[], $6::text[]) AS l(class, capacity, name)
    CROSS JOIN LATERAL (
        SELECT unit FROM generate_series(1, l.capacity) AS unit WHERE pg_try_advisory_xact_lock(l.class, $8 + unit) LIMIT 1
    ) u
), taken AS MATERIALIZED (
    SELECT coalesce(array_agg(unit), '{}') AS lock_units FROM units
)
SELECT slot, lock_units, cardinality(lock_units) = cardinality($4) AS locked,
       set_config('buildreactor.slot', CASE WHEN cardinality(lock_units) = cardinality($4) THEN slot::text ELSE '' END, true)
FROM slot CROSS JOIN taken
