-- What a mail says about its build. What a later attempt has overwritten in builds is null.
-- reason and log are bytes, in UTF-8: in a database with the encoding SQL_ASCII they may be cut within a character.
-- $1 row of build_mail
SELECT a.worker || coalesce(' (' || a.external_worker || ')', '') AS worker, t.started_at, t.finished_at, a.exit_code, a.term_signal, a.external_url,
       CASE WHEN b.attempt = m.attempt THEN b.detail ELSE a.detail END AS detail,
       extract(epoch FROM t.finished_at - t.started_at)::float8 AS ran_seconds,
       CASE WHEN b.attempt = m.attempt THEN extract(epoch FROM t.started_at - b.queued_at)::float8 END AS waited_seconds,
       u.seconds AS usual_seconds,
       convert_to(left(b.reason, 10000), e.bytes) AS reason, b.submitted_by,
       CASE WHEN octet_length(b.properties::text) <= 20000 THEN b.properties::text ELSE '{}' END AS properties,
       (SELECT CASE WHEN octet_length(o.own) <= 65536 THEN o.own ELSE '{}' END FROM (SELECT (to_jsonb(b) - '{id,builder,properties,reason,submitted_by,notify,state,attempt,worker,queued_at,started_at,finished_at,exit_code,term_signal,detail,cancel_requested_at,cancel_reason,superseded_by,needs,queued_by}'::text[])::text AS own) o) AS own,
       g.finished_at AS good_at,
       current_database()::text AS dbname,
       (SELECT convert_to(right(string_agg(l.content, '' ORDER BY l.seq), 65536), e.bytes)
        FROM (SELECT p.seq, p.content FROM farm.build_log p WHERE p.build_id = m.build_id AND p.attempt = m.attempt ORDER BY p.seq DESC LIMIT 100) l) AS log
FROM farm.build_mail m
JOIN farm.builds b ON b.id = m.build_id
CROSS JOIN (SELECT CASE getdatabaseencoding() WHEN 'SQL_ASCII' THEN 'SQL_ASCII' ELSE 'UTF8' END AS bytes) e
LEFT JOIN farm.build_attempts a ON a.build_id = m.build_id AND a.attempt = m.attempt
-- As builds has them, like those that a usual time comes from: of a build that another system ran they are that system's.
CROSS JOIN LATERAL (
    SELECT CASE WHEN b.attempt = m.attempt AND b.finished_at IS NOT NULL THEN b.started_at ELSE a.started_at END AS started_at,
           CASE WHEN b.attempt = m.attempt AND b.finished_at IS NOT NULL THEN b.finished_at ELSE a.finished_at END AS finished_at
) t
LEFT JOIN farm.builds g ON g.id = m.good_build_id AND g.state = 'passed' AND g.id <> m.build_id
LEFT JOIN LATERAL (
    SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM f.finished_at - f.started_at))::float8 AS seconds
    FROM (SELECT p.started_at, p.finished_at FROM farm.builds p
          WHERE p.builder = m.builder AND p.state = 'passed' AND p.started_at IS NOT NULL AND p.id <> m.build_id
          ORDER BY p.finished_at DESC LIMIT 30) f
) u ON true
WHERE m.id = $1::bigint
