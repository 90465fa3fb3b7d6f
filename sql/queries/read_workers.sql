-- Workers that have not stopped in order: active, draining or gone.
SELECT worker, status, running, slots FROM farm.worker_status WHERE status <> 'stopped' ORDER BY worker
