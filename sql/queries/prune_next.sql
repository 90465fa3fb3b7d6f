-- The next builder, by name, and how far its finished builds are kept: what comes before (finished_at, id) may go. Null: all are
-- kept. A time that is not finite has no age and no place in an order: such builds are left alone.
-- $1 text  the builder before    $2 float8  age in seconds; null: any    $3 bigint  how many are kept; null: all
-- Takes no lock. Walks as many entries of an index as builds are kept by $3.
SELECT r.name, kept.finished_at, kept.id
FROM (SELECT name FROM farm.builders WHERE name > $1 ORDER BY name LIMIT 1) r
LEFT JOIN LATERAL (
    SELECT bound.finished_at, bound.id FROM (
        SELECT clock_timestamp() - make_interval(secs => $2::float8) AS finished_at, 0::bigint AS id WHERE $2 IS NOT NULL
        UNION ALL
        (SELECT b.finished_at, b.id FROM farm.builds b
         WHERE b.builder = r.name AND b.finished_at IS NOT NULL AND isfinite(b.finished_at) AND $3::bigint IS NOT NULL
         ORDER BY b.finished_at DESC, b.id DESC OFFSET $3 - 1 LIMIT 1)
    ) bound
    ORDER BY bound.finished_at DESC, bound.id DESC LIMIT 1
) kept ON true
