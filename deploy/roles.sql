-- Roles for a build farm: who may do what in its database. Safe to run again, and to be run again after each
-- `buildreactor migrate`, by the owner of the tables who may create roles:
--
--     psql -d builds -f deploy/roles.sql
--
-- Roles belong to the whole cluster. Where it has two farms, or the tables are not in schema public, name things:
--
--     psql -d builds2 -v worker=worker2 -v submitter=submitter2 -v viewer=viewer2 -v operator=operator2 -v schema=farm -f deploy/roles.sql
--
-- None of them can log in: give them to those who can.
--
--     CREATE ROLE buildreactor LOGIN IN ROLE build_worker;     -- the daemon; by peer authentication the user of that name
--     CREATE ROLE alice LOGIN IN ROLE build_submitter;
--     CREATE ROLE ann LOGIN IN ROLE build_operator;
--     CREATE ROLE dashboard LOGIN IN ROLE build_viewer;
--
-- Everybody else may not connect to this database any more, nor create anything in the schema: give other roles that need to
-- connect, such as those that make backups, GRANT CONNECT ON DATABASE by name.
--
-- Who may change `builders` decides what runs on the workers. None of these roles may: that stays with the owner.

\set ON_ERROR_STOP on
\if :{?worker} \else \set worker build_worker \endif
\if :{?submitter} \else \set submitter build_submitter \endif
\if :{?viewer} \else \set viewer build_viewer \endif
\if :{?operator} \else \set operator build_operator \endif
\if :{?schema} \else \set schema public \endif

BEGIN;

SELECT format('CREATE ROLE %I NOLOGIN', name) FROM unnest(ARRAY[:'worker', :'submitter', :'viewer', :'operator']) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec

SELECT format('GRANT CONNECT ON DATABASE %I TO %I, %I, %I, %I', current_database(), :'worker', :'submitter', :'viewer', :'operator') \gexec
-- Who may create objects in the schema can put them before ours while it is migrated; who may connect can take advisory locks and send wakes.
SELECT format('REVOKE CONNECT ON DATABASE %I FROM PUBLIC', current_database()) \gexec
REVOKE CREATE ON SCHEMA :"schema" FROM PUBLIC;
GRANT USAGE ON SCHEMA :"schema" TO :"worker", :"submitter", :"viewer", :"operator";
SET LOCAL search_path = :"schema";

-- build_viewer sees everything but what may hold secrets: script, env and settings of builders.
GRANT SELECT ON queue_status, running_builds, recent_builds, builder_status, worker_status, build_stats, mail_status, build_advisory_locks TO :"viewer";
GRANT SELECT ON builds, build_queue, build_attempts, build_log, build_steps, build_locks, build_schedules, build_subscriptions, build_mail, build_cancels, workers TO :"viewer";
GRANT SELECT (name, description, executor, labels, locks, max_running, timeout, silence_timeout, max_attempts,
              retry_failed, keep_workspace, paused, paused_reason, branch_property) ON builders TO :"viewer";

-- Where EXECUTE and USAGE were taken from PUBLIC (ALTER DEFAULT PRIVILEGES): what views, CHECKs and conditions of triggers call, all of it
-- immutable, and what reads a log.
SELECT format('GRANT EXECUTE ON FUNCTION %s TO %I, %I', p.oid::regprocedure, :'viewer', :'worker')
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = :'schema' AND p.provolatile = 'i' AND p.proname ~ '^(build|mail)' \gexec
GRANT EXECUTE ON FUNCTION build_log_text(bigint, integer), build_session(integer) TO :"viewer";
GRANT EXECUTE ON FUNCTION build_holder(bigint), build_session(integer) TO :"worker";
GRANT USAGE ON TYPE build_state, attempt_state TO :"viewer", :"worker";

-- build_submitter is a viewer who may ask for builds and steer his own, and nothing else: a trigger writes the rest of the row in builds.
-- The functions refuse builds that another role submitted.
GRANT :"viewer" TO :"submitter";
GRANT INSERT ON build_queue TO :"submitter";
-- Describe first, queue later. Only these columns: a state or a result cannot be made up.
GRANT INSERT (builder, properties, reason, notify) ON builds TO :"submitter";
GRANT EXECUTE ON FUNCTION cancel_build(bigint, text), retry_build(bigint), prioritize_build(bigint, integer) TO :"submitter";

-- build_operator is a submitter who may also pause, resume and drain, by the functions alone, and change schedules and who gets mail. Who may
-- call pause_builder may cancel, retry and prioritize everybody's builds. Not what a builder runs, nor results, nor the history.
GRANT :"submitter" TO :"operator";
GRANT EXECUTE ON FUNCTION pause_builder(text, text), resume_builder(text), drain_worker(text), retry_mail(bigint), discard_mail(bigint) TO :"operator";
GRANT INSERT, UPDATE, DELETE ON build_schedules, build_subscriptions TO :"operator";

-- build_worker is for daemons: they claim (which needs UPDATE on the queue), record, write logs and report in.
-- They only read builders: a worker that was broken into cannot change what the others run.
GRANT SELECT ON ALL TABLES IN SCHEMA :"schema" TO :"worker";
GRANT INSERT, UPDATE, DELETE ON build_queue TO :"worker";
GRANT UPDATE ON build_schedules, build_mail TO :"worker";
GRANT UPDATE ON builds TO :"worker";
GRANT UPDATE, DELETE ON build_cancels TO :"worker";
GRANT INSERT, UPDATE ON build_attempts, build_steps, workers TO :"worker";
GRANT INSERT, UPDATE, DELETE ON build_log TO :"worker";
GRANT EXECUTE ON FUNCTION build_needs_settle(bigint), build_needs_follow(bigint[], double precision), build_settle_some(bigint, integer), build_queue_supersede(text, text, bigint),
    build_cancel_settle(bigint), build_prune(bigint[]), build_characters_fit(bytea[]), mail_mailbox(text) TO :"worker";
-- Not the history: a worker that was broken into cannot delete it. One whose [retention] has builds or builds_per_builder needs:
--     GRANT DELETE ON builds TO build_worker;

COMMIT;
