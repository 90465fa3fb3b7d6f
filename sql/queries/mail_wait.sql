-- Seconds until the next mail is due, by the server's clock; null: there is none.
SELECT extract(epoch FROM (SELECT m.next_at FROM build_mail m WHERE m.state IN ('waiting', 'sending') ORDER BY m.next_at LIMIT 1)
                          - clock_timestamp())::float8 AS seconds
