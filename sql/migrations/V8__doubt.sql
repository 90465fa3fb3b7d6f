-- What tells where an attempt began, and which daemon said hello, whatever becomes of files and of answers.

ALTER TABLE build_attempts ADD COLUMN boot text;
COMMENT ON COLUMN build_attempts.boot IS 'Id of the boot of the machine that it began on. Internal.';

ALTER TABLE workers ADD COLUMN run text;
COMMENT ON COLUMN workers.run IS 'Id of the daemon that reported last, another one at each start. Internal.';
