-- What [retention] cannot delete, where people look.

ALTER TABLE workers ADD COLUMN kept text;
COMMENT ON COLUMN workers.kept IS 'What its [retention] would delete and could not, in its last round, and why; null: nothing.';
