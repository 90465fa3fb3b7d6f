-- What a worker's [retention] would delete and cannot.
-- $1 text  name    $2 text  one line for a person; null: nothing
UPDATE farm.workers SET kept = $2 WHERE name = $1 AND kept IS DISTINCT FROM $2
