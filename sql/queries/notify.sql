-- Tells whoever listens, after the COMMIT that it tells about and in a transaction of its own.
-- $1 text[]  payloads for build_events    $2 boolean  wake the other workers as well
-- Columns of the users' own are added, unless it would be too long for a payload (8000 bytes).
SELECT count(pg_notify('build_events', CASE WHEN octet_length(whole.payload) < 8000 THEN whole.payload ELSE event.payload END))
FROM unnest($1::text[]) AS event(payload)
LEFT JOIN farm.builds b ON b.id = (event.payload::jsonb ->> 'build_id')::bigint
CROSS JOIN LATERAL (
    SELECT (coalesce(to_jsonb(b) - '{id,builder,properties,reason,submitted_by,notify,state,attempt,worker,queued_at,started_at,finished_at,exit_code,term_signal,detail,cancel_requested_at,cancel_reason,superseded_by,needs,queued_by}'::text[], '{}')
            || event.payload::jsonb)::text AS payload
) whole
UNION ALL SELECT count(pg_notify('build_queue', '')) WHERE $2
