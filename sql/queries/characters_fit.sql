-- Which of these characters, each in UTF-8, the database's encoding has.
-- $1 characters
SELECT farm.build_characters_fit($1::bytea[])
