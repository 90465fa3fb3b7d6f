-- Exclusive resources: a build runs only while it holds one unit of each lock that its builder names.

CREATE TABLE build_locks (
    name     text PRIMARY KEY,
    number   integer GENERATED ALWAYS AS IDENTITY,
    capacity integer NOT NULL DEFAULT 1,
    CONSTRAINT build_locks_number_is_unique UNIQUE (number),
    CONSTRAINT lock_name_is_1_to_63_of_letters_digits_dot_underscore_minus CHECK (name ~ '^[A-Za-z0-9._-]{1,63}$'),
    CONSTRAINT capacity_is_1_to_1000 CHECK (capacity BETWEEN 1 AND 1000)
);
COMMENT ON TABLE build_locks IS 'Exclusive resources, named in builders.locks. A build runs only while it holds one unit of each, over all workers.';
COMMENT ON COLUMN build_locks.name IS 'Letters, digits, . _ - ; at most 63 bytes.';
COMMENT ON COLUMN build_locks.number IS 'Key of its units in pg_locks (classid -1000 - number). Internal.';
COMMENT ON COLUMN build_locks.capacity IS 'How many builds may hold it at once.';

ALTER TABLE builders
    DROP CONSTRAINT locks_are_not_supported_by_this_version,
    ADD CONSTRAINT locks_have_no_nulls CHECK (array_position(locks, NULL) IS NULL);
COMMENT ON COLUMN builders.locks IS 'Names of build_locks; its builds run only while they hold one unit of each.';

ALTER TABLE build_attempts ADD COLUMN lock_units text[] NOT NULL DEFAULT '{}';
COMMENT ON COLUMN build_attempts.lock_units IS 'Units of build_locks that it uses (NAME#UNIT); no other running build has the same.';
