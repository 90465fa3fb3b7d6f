-- Who uses a worker's name.
-- $1 text  name
SELECT host, pid FROM workers WHERE name = $1
