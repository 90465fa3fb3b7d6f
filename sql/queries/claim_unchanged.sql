-- How often an attempt was claimed, fixed until the end of the transaction: see claim_count.sql. Runs in a claim's transaction that is about
-- to record the attempt as lost.
-- $1 bigint  build    $2 integer  attempt
-- Locks: the row of build_attempts.
SELECT claims FROM farm.build_attempts WHERE build_id = $1 AND attempt = $2 FOR UPDATE
