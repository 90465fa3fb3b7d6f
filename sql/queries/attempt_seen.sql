-- What another system tells of an attempt while it runs there: where it is shown, who builds it, its steps. Nothing once it has ended.
-- $1 bigint  build    $2 integer  attempt    $3 text  url    $4 text  worker there
-- $5 jsonb   steps: [{"position", "name", "state", "started_us", "finished_us" (microseconds since 1970), "detail"}]
WITH running AS MATERIALIZED (
    SELECT a.external_url, a.external_worker FROM farm.build_attempts a WHERE a.build_id = $1 AND a.attempt = $2 AND a.state = 'running'
), place AS (
    UPDATE farm.build_attempts a SET external_url = $3, external_worker = $4 FROM running r
    WHERE a.build_id = $1 AND a.attempt = $2 AND (r.external_url, r.external_worker) IS DISTINCT FROM ($3, $4)
)
INSERT INTO farm.build_steps AS t (build_id, attempt, position, name, state, started_at, finished_at, detail)
SELECT $1, $2, s.position, s.name, s.state, 'epoch'::timestamptz + s.started_us * interval '1 microsecond',
       'epoch'::timestamptz + s.finished_us * interval '1 microsecond', s.detail
FROM running CROSS JOIN jsonb_to_recordset($5)
     AS s(position integer, name text, state text, started_us bigint, finished_us bigint, detail text)
ON CONFLICT (build_id, attempt, position) DO UPDATE
SET name = excluded.name, state = excluded.state, started_at = excluded.started_at, finished_at = excluded.finished_at, detail = excluded.detail
WHERE (t.name, t.state, t.started_at, t.finished_at, t.detail)
      IS DISTINCT FROM (excluded.name, excluded.state, excluded.started_at, excluded.finished_at, excluded.detail)
