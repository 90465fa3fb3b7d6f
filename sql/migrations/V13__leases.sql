-- What workers have to know of each other.
--
-- The lease that a build's tree lives by stands with its attempt: other workers wait for that one, however they are set themselves.

ALTER TABLE build_attempts ADD COLUMN lease interval;
COMMENT ON COLUMN build_attempts.lease IS
    'How long its processes live after the last sign of its claim: the longest [lease] lease that it was given. Others leave it alone for longer. Null: begun by a program older than this column.';

ALTER TABLE workers
    ADD COLUMN lease interval,
    ADD COLUMN grace interval,
    -- 10 seconds: KILL_TIME. They are a part of every version, and no worker may count on less.
    ADD CONSTRAINT grace_is_at_least_the_lease_and_10_seconds_to_kill_a_tree CHECK (lease > '0' AND grace >= lease + interval '10 seconds');
COMMENT ON COLUMN workers.lease IS '[lease] lease of its daemon. Null: of a program older than this column.';
COMMENT ON COLUMN workers.grace IS '[lease] grace of its daemon: how long it leaves a running build that nobody holds alone; longer where that build''s lease is longer than its own.';

-- The keys of advisory locks are others since this version.
COMMENT ON COLUMN builders.number IS 'Part of the keys of its slots: see build_advisory_locks. Internal.';
COMMENT ON COLUMN build_locks.number IS 'Part of the keys of its units: see build_advisory_locks. Internal.';
