-- Who uses a worker's name.
-- $1 text  name
SELECT host, pid, folder FROM farm.workers WHERE name = $1
