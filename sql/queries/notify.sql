-- Tells whoever listens, after the COMMIT that it tells about and in a transaction of its own.
-- $1 text[]  payloads for build_events    $2 boolean  wake the other workers as well
SELECT count(pg_notify('build_events', payload)) FROM unnest($1::text[]) AS payload
UNION ALL SELECT count(pg_notify('build_queue', '')) WHERE $2
