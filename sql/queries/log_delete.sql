-- Removes pieces from the middle of a log.
-- $1 bigint build  $2 integer attempt  $3 bigint first seq  $4 bigint last seq
DELETE FROM farm.build_log WHERE build_id = $1 AND attempt = $2 AND seq BETWEEN $3 AND $4
