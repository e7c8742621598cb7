--
-- security: who may do what, all of it; what becomes of those who try more
--
SET statement_timeout = '2min';

SET client_min_messages = error;
DROP ROLE IF EXISTS regress_sb_owner, regress_sb_member, regress_sb_app,
  regress_sb_reader, regress_sb_stranger, regress_sb_monitor;
RESET client_min_messages;
CREATE ROLE regress_sb_owner LOGIN;
CREATE ROLE regress_sb_member IN ROLE regress_sb_owner;
CREATE ROLE regress_sb_app;
CREATE ROLE regress_sb_reader;
CREATE ROLE regress_sb_stranger LOGIN;
CREATE ROLE regress_sb_monitor IN ROLE pg_read_all_stats;
CREATE SCHEMA sb_sec AUTHORIZATION regress_sb_owner;
GRANT USAGE ON SCHEMA sb_sec TO PUBLIC;
GRANT USAGE ON FOREIGN SERVER statbuffer TO regress_sb_owner;
CREATE SCHEMA sb_strange AUTHORIZATION regress_sb_stranger;
SET search_path = sb_sec, public;

SET ROLE regress_sb_owner;
CREATE TABLE stored (key text, total bigint, by_user name, by_session name);
CREATE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql AS $$
  INSERT INTO sb_sec.stored VALUES (key, counter, current_user, session_user)
$$;
CREATE FOREIGN TABLE buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer
  OPTIONS (handler 'sb_sec.store', interval '1h', timeout '1h', backoff '1h');
GRANT INSERT ON buf TO regress_sb_app;
GRANT SELECT ON buf TO regress_sb_reader;
INSERT INTO buf VALUES ('k', 7);
RESET ROLE;

-- What a statement says to a role: 'ok', or the SQLSTATE.  Whatever it does is
-- undone.
CREATE FUNCTION attempt(who name, statement text) RETURNS text
LANGUAGE plpgsql AS $$
BEGIN
  EXECUTE format('SET LOCAL ROLE %I', who);
  EXECUTE statement;
  RAISE EXCEPTION USING ERRCODE = 'UNDO1';
EXCEPTION
  WHEN SQLSTATE 'UNDO1' THEN RETURN 'ok';
  WHEN OTHERS THEN RETURN SQLSTATE;
END $$;
GRANT EXECUTE ON FUNCTION attempt TO PUBLIC;

--
-- Everything that can be done with a buffer, by everybody
--
CREATE TABLE deeds (n serial, deed text);
INSERT INTO deeds (deed) VALUES
  ($$SELECT sb_increment('k', 1, 'sb_sec.buf')$$),
  ($$SELECT sb_increment('k'::varchar, 1, 'sb_sec.buf')$$),
  ($$SELECT sb_async_increment('k', 0, 'sb_sec.buf')$$),
  ($$INSERT INTO sb_sec.buf VALUES ('k')$$),
  ($$SELECT sb_count('k', 'sb_sec.buf')$$),
  ($$SELECT * FROM sb_sec.buf$$),
  ($$SELECT * FROM sb_keys('sb_sec.buf')$$),
  ($$INSERT INTO sb_sec.buf VALUES ('k') RETURNING count$$),
  ($$SELECT sb_flush('none', 'sb_sec.buf')$$),
  ($$SELECT sb_flush_all('sb_sec.buf')$$),
  ($$SELECT sb_drain('sb_sec.buf')$$),
  ($$SELECT sb_stop('sb_sec.buf')$$),
  ($$SELECT sb_start('sb_sec.buf')$$),
  ($$SELECT sb_stat_reset('sb_sec.buf')$$),
  ($$TRUNCATE sb_sec.buf$$),
  ($$UPDATE sb_sec.buf SET count = 0$$),
  ($$DELETE FROM sb_sec.buf$$),
  ($$ALTER FOREIGN TABLE sb_sec.buf OPTIONS (SET interval '1s')$$),
  ($$ALTER FOREIGN TABLE sb_sec.buf OPTIONS (SET handler 'sb_strange.store')$$),
  ($$ALTER FOREIGN TABLE sb_sec.buf ALTER COLUMN count SET DEFAULT 2$$),
  ($$ALTER FOREIGN TABLE sb_sec.buf RENAME TO bof$$),
  ($$ALTER FOREIGN TABLE sb_sec.buf OWNER TO regress_sb_stranger$$),
  ($$COMMENT ON FOREIGN TABLE sb_sec.buf IS 'x'$$),
  ($$CREATE TRIGGER t AFTER INSERT ON sb_sec.buf EXECUTE FUNCTION suppress_redundant_updates_trigger()$$),
  ($$DROP FOREIGN TABLE sb_sec.buf$$),
  ($$CREATE FOREIGN TABLE pg_temp.b (key text, count bigint) SERVER statbuffer$$),
  ($$ALTER SERVER statbuffer OWNER TO CURRENT_USER$$),
  ($$ALTER SERVER statbuffer VERSION '2'$$),
  ($$CREATE SERVER more FOREIGN DATA WRAPPER statbuffer$$),
  ($$ALTER FOREIGN DATA WRAPPER statbuffer NO VALIDATOR$$),
  ($$CREATE FOREIGN DATA WRAPPER mine HANDLER statbuffer_fdw_handler$$),
  ($$CREATE FUNCTION sb_strange.mine(text, bigint, regclass) RETURNS void
     LANGUAGE c AS '$libdir/statbuffer', 'sb_increment'$$),
  ($$DROP EXTENSION statbuffer CASCADE$$),
  ($$ALTER EXTENSION statbuffer DROP VIEW sb_stat_buffers$$),
  ($$SET statbuffer.max_memory = '1GB'$$),
  ($$SET statbuffer.max_shutdown = '1d'$$),
  ($$ALTER ROLE CURRENT_USER SET statbuffer.max_workers = 1000$$);
SELECT split_part(deed, E'\n', 1) AS deed,
       attempt('regress_sb_owner', deed) AS owner,
       attempt('regress_sb_member', deed) AS member,
       attempt('regress_sb_app', deed) AS "INSERT",
       attempt('regress_sb_reader', deed) AS "SELECT",
       attempt('regress_sb_stranger', deed) AS stranger,
       attempt('regress_sb_monitor', deed) AS monitor
  FROM deeds ORDER BY n;
-- sb_drain() is not undone: the handler has run as the owner.
SELECT key, sum(total), by_user, by_session FROM stored GROUP BY 1, 3, 4;
TRUNCATE stored;

-- Who grants what he lacks grants nothing.
SET ROLE regress_sb_app;
GRANT INSERT ON buf TO regress_sb_stranger;
GRANT SELECT ON buf TO regress_sb_app;
SET ROLE regress_sb_owner;
GRANT USAGE ON FOREIGN SERVER statbuffer TO regress_sb_stranger;
SET ROLE regress_sb_stranger;
GRANT ALL ON buf TO regress_sb_stranger;
RESET ROLE;
SELECT has_table_privilege('regress_sb_stranger', 'buf', 'INSERT') AS stranger,
       has_table_privilege('regress_sb_app', 'buf', 'SELECT') AS app,
       has_server_privilege('regress_sb_stranger', 'statbuffer', 'USAGE') AS server;

-- A superuser may do to a buffer what its owner may, and no UPDATE either.
SELECT deed FROM deeds
  WHERE deed LIKE '%sb_sec.buf%' AND attempt(CURRENT_USER, deed) <> 'ok'
  ORDER BY n;
SELECT sb_drain('buf');

-- What is in the view for everybody is no secret; the last error is one.
SET ROLE regress_sb_owner;
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE plpgsql
AS $$ BEGIN RAISE 'a secret of %', key; END $$;
SELECT sb_increment('k', 5, 'buf');
SELECT sb_flush('k', 'buf');
SELECT wait_until($$ (SELECT failures > 0 AND last_error IS NOT NULL FROM sb_keys('sb_sec.buf') WHERE key = 'k') $$);
RESET ROLE;
CREATE FUNCTION seen_by(who name, query text) RETURNS SETOF text
LANGUAGE plpgsql AS $$
BEGIN
  EXECUTE format('SET LOCAL ROLE %I', who);
  RETURN QUERY EXECUTE query;
  RESET ROLE;
EXCEPTION WHEN OTHERS THEN
  RETURN NEXT SQLERRM;
END $$;
-- All columns that are not null.
SELECT who, seen
  FROM unnest(ARRAY['regress_sb_owner', 'regress_sb_member', 'regress_sb_app', 'regress_sb_reader',
                    'regress_sb_stranger', 'regress_sb_monitor', CURRENT_USER]) WITH ORDINALITY AS u (who, n),
       seen_by(who, $$
         SELECT string_agg(key, ' ' ORDER BY n)
           FROM sb_stat_buffers s,
                json_each(row_to_json(s)) WITH ORDINALITY AS j (key, value, n)
           WHERE buffer LIKE '%buf' AND value::text <> 'null' AND key NOT IN ('pid', 'last_flush') $$) AS seen
  ORDER BY n;
SELECT who, seen
  FROM unnest(ARRAY['regress_sb_owner', 'regress_sb_member', 'regress_sb_app', 'regress_sb_reader',
                    'regress_sb_stranger', 'regress_sb_monitor', CURRENT_USER]) WITH ORDINALITY AS u (who, n),
       seen_by(who, $$
         SELECT format('%s: %s + %s, %s, %s', key, count, in_flight, failures, coalesce(last_error, '(null)'))
           FROM sb_keys('sb_sec.buf') WHERE count <> 0 $$) AS seen
  ORDER BY n;
-- The function under the view is not a way round it.
SELECT seen_by('regress_sb_stranger', $$
  SELECT coalesce(last_error, '(null)') FROM sb_stat_get_buffer('sb_sec.buf'::regclass) $$);
TRUNCATE buf;
SELECT sb_stat_reset('buf');
SET ROLE regress_sb_owner;
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql AS $$
  INSERT INTO sb_sec.stored VALUES (key, counter, current_user, session_user)
$$;
RESET ROLE;

--
-- Relations that are no buffer of his, in the hands of a stranger
--
SET ROLE regress_sb_stranger;
CREATE TABLE sb_strange.plain (key text PRIMARY KEY, count bigint);
CREATE TEMP TABLE temporary (key text, count bigint);
CREATE UNLOGGED TABLE sb_strange.unlogged (key text, count bigint);
CREATE TABLE sb_strange.parted (key text, count bigint) PARTITION BY LIST (key);
CREATE TABLE sb_strange.part PARTITION OF sb_strange.parted DEFAULT;
CREATE VIEW sb_strange.a_view AS SELECT * FROM sb_strange.plain;
CREATE VIEW sb_strange.over_buf AS SELECT * FROM sb_sec.buf;
CREATE MATERIALIZED VIEW sb_strange.mat AS SELECT * FROM sb_strange.plain;
CREATE SEQUENCE sb_strange.seq;
CREATE TYPE sb_strange.composite AS (key text, count bigint);
RESET ROLE;
-- A superuser gave him a foreign table of another wrapper, and one of ours
-- that has not the shape of a buffer.
CREATE FOREIGN DATA WRAPPER other_wrapper;
CREATE SERVER other_server FOREIGN DATA WRAPPER other_wrapper;
CREATE FOREIGN TABLE sb_strange.other (key text, count bigint) SERVER other_server;
CREATE FOREIGN TABLE sb_strange.shapeless (key text) SERVER statbuffer;
ALTER FOREIGN TABLE sb_strange.other OWNER TO regress_sb_stranger;
ALTER FOREIGN TABLE sb_strange.shapeless OWNER TO regress_sb_stranger;
CREATE TABLE to_drop (key text, count bigint);
SELECT 'to_drop'::regclass::oid AS dropped \gset
DROP TABLE to_drop;

CREATE TABLE relations (n serial, name text);
INSERT INTO relations (name) VALUES
  ('sb_strange.plain'), ('sb_strange.plain_pkey'), ('temporary'), ('sb_strange.unlogged'), ('sb_strange.parted'),
  ('sb_strange.part'), ('sb_strange.a_view'), ('sb_strange.over_buf'), ('sb_strange.mat'),
  ('sb_strange.seq'), ('sb_strange.composite'), ('sb_strange.other'), ('sb_strange.shapeless'),
  ('sb_sec.buf'), ('sb_sec.stored'), ('pg_class'), ('pg_database'), ('pg_authid'), ('pg_class_oid_index'),
  ('pg_toast.pg_toast_1255'), ('sb_stat_buffers'), ('information_schema.tables'),
  ('0'), ('4294967295'), (:'dropped');
CREATE TABLE calls (n serial, name text, call text);
INSERT INTO calls (name, call) VALUES
  ('increment', 'SELECT sb_increment(''k'', 1, %L::regclass)'),
  ('async', 'SELECT sb_async_increment(''k'', 1, %L::regclass)'),
  ('count', 'SELECT sb_count(''k'', %L::regclass)'),
  ('keys', 'SELECT * FROM sb_keys(%L::regclass)'),
  ('flush', 'SELECT sb_flush(''k'', %L::regclass)'),
  ('flush_all', 'SELECT sb_flush_all(%L::regclass)'),
  ('drain', 'SELECT sb_drain(%L::regclass)'),
  ('stop', 'SELECT sb_stop(%L::regclass)'),
  ('start', 'SELECT sb_start(%L::regclass)'),
  ('reset', 'SELECT sb_stat_reset(%L::regclass)'),
  ('statistics', 'SELECT * FROM sb_stat_get_buffer(%L::regclass)');
-- Each is refused, as not his or as not a buffer; the statistics are null.
SELECT CASE WHEN r.name = :'dropped' THEN 'dropped' ELSE r.name END AS relation,
       string_agg(DISTINCT attempt('regress_sb_stranger', format(call, r.name)), ' ')
         FILTER (WHERE c.name IN ('increment', 'async')) AS increment,
       string_agg(DISTINCT attempt('regress_sb_stranger', format(call, r.name)), ' ')
         FILTER (WHERE c.name IN ('count', 'keys')) AS read,
       string_agg(DISTINCT attempt('regress_sb_stranger', format(call, r.name)), ' ')
         FILTER (WHERE c.name IN ('flush', 'flush_all', 'drain', 'stop', 'start', 'reset')) AS owners,
       string_agg(DISTINCT attempt('regress_sb_stranger', format(call, r.name)), ' ')
         FILTER (WHERE c.name = 'statistics') AS statistics
  FROM relations r CROSS JOIN calls c GROUP BY r.n, r.name ORDER BY r.n;
-- Nobody keeps a lock of it.
SELECT relation::regclass, mode FROM pg_locks
  WHERE pid = pg_backend_pid() AND locktype = 'relation' AND mode NOT IN ('AccessShareLock')
    AND relation IN (SELECT oid FROM pg_class WHERE relnamespace IN ('sb_strange'::regnamespace, 'sb_sec'::regnamespace));
-- A table with a buffer as a partition is no buffer, the partition is one.
SET ROLE regress_sb_owner;
CREATE TABLE split (key text NOT NULL, count bigint NOT NULL DEFAULT 1) PARTITION BY LIST (key);
ALTER TABLE split ATTACH PARTITION buf DEFAULT;
GRANT INSERT ON split TO regress_sb_stranger;
SET ROLE regress_sb_stranger;
SELECT sb_increment('k', buffer => 'sb_sec.split');
SELECT sb_increment('k', buffer => 'sb_sec.buf');
-- As with any partition, the privilege on what is named counts.
INSERT INTO sb_sec.split VALUES ('k');
SET ROLE regress_sb_owner;
SELECT * FROM buf;
ALTER TABLE split DETACH PARTITION buf;
DROP TABLE split;
TRUNCATE buf;
RESET ROLE;

-- Without USAGE on the schema, a buffer cannot be named; its OID can, with what
-- the privileges on the buffer itself allow, as with sequences.
CREATE SCHEMA closed AUTHORIZATION regress_sb_owner;
SET ROLE regress_sb_owner;
CREATE FOREIGN TABLE closed.buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_sec.store', interval '1h');
GRANT INSERT ON closed.buf TO regress_sb_app;
SELECT 'closed.buf'::regclass::oid AS closed_buf \gset
SELECT attempt('regress_sb_app', $$SELECT sb_increment('k', 1, 'closed.buf')$$) AS by_name,
       attempt('regress_sb_app', format('SELECT sb_increment(''k'', 1, %s)', :closed_buf)) AS by_oid,
       attempt('regress_sb_reader', format('SELECT sb_increment(''k'', 1, %s)', :closed_buf)) AS without_insert;
RESET ROLE;
SET client_min_messages = warning;
DROP SCHEMA closed CASCADE;
RESET client_min_messages;

--
-- A stranger's function as the handler
--
-- Wherever it comes from, nothing of it runs as the buffer's owner.
SET ROLE regress_sb_stranger;
CREATE TABLE sb_strange.loot (who name);
GRANT USAGE ON SCHEMA sb_strange TO PUBLIC;
GRANT ALL ON sb_strange.loot TO PUBLIC;
CREATE FUNCTION sb_strange.rob() RETURNS bigint LANGUAGE sql AS
  'INSERT INTO sb_strange.loot VALUES (current_user); SELECT 1::bigint';
CREATE FUNCTION sb_strange.store(key text, counter bigint) RETURNS void LANGUAGE sql AS
  'SELECT sb_strange.rob()';
RESET ROLE;
-- One that stands before the owner's on the path, and one that suits better:
-- with arrays, or with the exact types.
GRANT CREATE ON SCHEMA sb_sec TO regress_sb_stranger;
SET ROLE regress_sb_owner;
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'sb_sec.store', SET backoff '1s');
SELECT sb_start('buf');
SET ROLE regress_sb_stranger;
CREATE FUNCTION sb_sec.store(key text[], counter bigint[]) RETURNS void LANGUAGE sql AS
  'SELECT sb_strange.rob()';
SET ROLE regress_sb_owner;
\set VERBOSITY terse
SELECT sb_start('buf');
SELECT sb_increment('k', 3, 'buf');
SELECT sb_flush_all('buf');
SELECT wait_until($$ (SELECT last_error IS NOT NULL FROM sb_stat_buffers WHERE relid = 'sb_sec.buf'::regclass) $$);
SELECT sb_count('k', 'buf');
-- The owner of a schema can drop what is in it.
DROP FUNCTION store(text[], bigint[]);
SELECT sb_drain('buf');
SELECT * FROM stored;
-- The owner's own function, dropped and made again by a stranger
DROP FUNCTION store(text, bigint);
SET ROLE regress_sb_stranger;
CREATE FUNCTION sb_sec.store(key text, counter bigint) RETURNS void LANGUAGE sql AS
  'SELECT sb_strange.rob()';
SELECT sb_strange.rob() IS NOT NULL AS it_works;
DELETE FROM sb_strange.loot;
SET ROLE regress_sb_owner;
SELECT sb_start('buf');
SELECT sb_stat_reset('buf');
SELECT sb_increment('k', 4, 'buf');
SELECT sb_flush_all('buf');
SELECT wait_until($$ (SELECT last_error IS NOT NULL FROM sb_stat_buffers WHERE relid = 'sb_sec.buf'::regclass) $$);
SELECT sb_count('k', 'buf');
DROP FUNCTION sb_sec.store(text, bigint);
CREATE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql AS $$
  INSERT INTO sb_sec.stored VALUES (key, counter, current_user, session_user)
$$;
SELECT sb_drain('buf');
SELECT sum(total) FROM stored;
TABLE sb_strange.loot;
-- A stranger may call the handler himself if he has EXECUTE; that is a call
-- like any other, with his own rights.
SET ROLE regress_sb_stranger;
SELECT sb_sec.store('k', 1000000);
RESET ROLE;

-- The stranger's own buffer with the owner's function: it is not run either
-- way, neither as the owner nor with the owner's rights.
GRANT USAGE ON FOREIGN SERVER statbuffer TO regress_sb_stranger;
SET ROLE regress_sb_stranger;
CREATE FOREIGN TABLE sb_strange.buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_sec.store', interval '1h', backoff '1h');
SELECT sb_start('sb_strange.buf');
SELECT sb_increment('k', 1000000, 'sb_strange.buf');
SELECT sb_flush_all('sb_strange.buf');
SELECT wait_until($$ (SELECT last_error IS NOT NULL FROM sb_stat_buffers WHERE relid = 'sb_strange.buf'::regclass) $$);
SELECT last_error FROM sb_stat_buffers WHERE relid = 'sb_strange.buf'::regclass;
-- A superuser's function may be a handler, and has his own rights no more
-- than anywhere else.
RESET ROLE;
CREATE FUNCTION public.sb_sec_super(key text, counter bigint) RETURNS void LANGUAGE sql AS $$
  INSERT INTO sb_sec.stored VALUES (key, counter, current_user, session_user)
$$;
SET ROLE regress_sb_stranger;
ALTER FOREIGN TABLE sb_strange.buf OPTIONS (SET handler 'public.sb_sec_super');
SELECT sb_start('sb_strange.buf');
SELECT sb_flush('k', 'sb_strange.buf');
SELECT wait_until($$ (SELECT failures > 0 AND last_error IS NOT NULL FROM sb_keys('sb_strange.buf')) $$);
SELECT last_error FROM sb_keys('sb_strange.buf');
-- To give it to a role that he is not, so that it runs as that role, he may not.
\set VERBOSITY sqlstate
ALTER FOREIGN TABLE sb_strange.buf OWNER TO regress_sb_owner;
\set VERBOSITY terse
RESET ROLE;
TRUNCATE sb_strange.buf;
DROP FUNCTION public.sb_sec_super;
SELECT sum(total) FROM stored;
\set VERBOSITY default

-- The type of a key column, the functions of which run with whoever reads a
-- key: with a stranger's buffer it is the stranger's, as with his tables.
SET ROLE regress_sb_stranger;
CREATE DOMAIN sb_strange.trap AS text CHECK (sb_strange.rob() = 1);
CREATE FOREIGN TABLE sb_strange.trapped (key sb_strange.trap NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_sec.store', interval '1h');
GRANT INSERT, SELECT ON sb_strange.trapped TO PUBLIC;
SET ROLE regress_sb_app;
SELECT sb_increment('k', 1, 'sb_strange.trapped');
INSERT INTO sb_strange.trapped VALUES ('k');
SELECT sb_count('k', 'sb_strange.trapped');
RESET ROLE;
SELECT who, count(*) FROM sb_strange.loot GROUP BY who;
-- To look at it runs nothing of his.
DELETE FROM sb_strange.loot;
SELECT key, count FROM sb_keys('sb_strange.trapped');
SELECT * FROM sb_strange.trapped;
SELECT keys, pending FROM sb_stat_buffers WHERE relid = 'sb_strange.trapped'::regclass;
TABLE sb_strange.loot;
DROP FOREIGN TABLE sb_strange.trapped;

--
-- SECURITY DEFINER, SET ROLE, views
--
-- Both ways through a function: the right is the one of whoever it runs as.
SET ROLE regress_sb_owner;
CREATE FUNCTION look(k text) RETURNS bigint LANGUAGE sql SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$ SELECT sb_count(k, 'sb_sec.buf') $$;
CREATE FUNCTION drain() RETURNS boolean LANGUAGE sql SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$ SELECT sb_drain('sb_sec.buf') $$;
CREATE FUNCTION count_one(k text) RETURNS void LANGUAGE sql SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$ SELECT sb_increment(k, 1, 'sb_sec.buf') $$;
SET ROLE regress_sb_stranger;
SELECT count_one('definer');
SELECT look('definer');
SELECT drain();
SELECT look('definer');
SELECT sb_count('definer', 'sb_sec.buf');
CREATE FUNCTION sb_strange.weak(k text) RETURNS void LANGUAGE sql SECURITY DEFINER
  AS $$ SELECT sb_increment(k, 1, 'sb_sec.buf') $$;
GRANT EXECUTE ON FUNCTION sb_strange.weak TO PUBLIC;
SET ROLE regress_sb_owner;
SELECT sb_strange.weak('k');
-- A trigger is run as who changes the table.
CREATE TABLE log (key text);
GRANT INSERT ON log TO regress_sb_app, regress_sb_stranger;
CREATE FUNCTION count_log() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM public.sb_increment(new.key, 1, 'sb_sec.buf'); RETURN NULL; END $$;
CREATE TRIGGER t AFTER INSERT ON log FOR EACH ROW EXECUTE FUNCTION count_log();
SET ROLE regress_sb_stranger;
INSERT INTO sb_sec.log VALUES ('row');
SET ROLE regress_sb_app;
INSERT INTO sb_sec.log VALUES ('row');
SET ROLE regress_sb_owner;
ALTER FUNCTION count_log() SECURITY DEFINER;
SET ROLE regress_sb_stranger;
INSERT INTO sb_sec.log VALUES ('row');
SET ROLE regress_sb_owner;
SELECT * FROM buf;
-- The role can change within a transaction, and what was counted before stays.
BEGIN;
SET LOCAL ROLE regress_sb_app;
SELECT sb_increment('role', 1, 'buf');
SET LOCAL ROLE regress_sb_stranger;
SAVEPOINT s;
SELECT sb_increment('role', 1, 'buf');
ROLLBACK TO s;
SET LOCAL ROLE regress_sb_app;
SELECT sb_increment('role', 1, 'buf');
COMMIT;
-- So can a privilege.
RESET ROLE;
BEGIN;
SET LOCAL ROLE regress_sb_app;
SELECT sb_increment('role', 1, 'sb_sec.buf');
RESET ROLE;
REVOKE INSERT ON sb_sec.buf FROM regress_sb_app;
SET LOCAL ROLE regress_sb_app;
SAVEPOINT s;
SELECT sb_increment('role', 1, 'sb_sec.buf');
ROLLBACK TO s;
COMMIT;
GRANT INSERT ON sb_sec.buf TO regress_sb_app;
SELECT sb_count('role', 'buf');
SELECT sb_drain('buf');
TRUNCATE stored;

--
-- Row security
--
-- A buffer has none, as no foreign table has.
ALTER FOREIGN TABLE buf ENABLE ROW LEVEL SECURITY;
ALTER TABLE buf ENABLE ROW LEVEL SECURITY;
CREATE POLICY p ON buf USING (key = 'k');
-- The tables that a handler writes may have policies.  They are applied to the
-- buffer's owner, who is the current user there; those for whoever has counted
-- are not.
SET client_min_messages = warning;
CREATE TABLE guarded (key text PRIMARY KEY, total bigint, by_user name DEFAULT current_user);
ALTER TABLE guarded ENABLE ROW LEVEL SECURITY;
CREATE POLICY mine ON guarded TO regress_sb_owner
  USING (by_user = current_user AND session_user = current_user) WITH CHECK (key LIKE 'ok%');
CREATE POLICY theirs ON guarded TO regress_sb_app USING (false) WITH CHECK (false);
GRANT SELECT, INSERT, UPDATE ON guarded TO regress_sb_owner, regress_sb_app;
RESET client_min_messages;
SET ROLE regress_sb_owner;
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql AS $$
  INSERT INTO sb_sec.guarded AS g VALUES (key, counter)
  ON CONFLICT (key) DO UPDATE SET total = g.total + EXCLUDED.total
$$;
ALTER FOREIGN TABLE buf OPTIONS (SET backoff '1h');
SET ROLE regress_sb_app;
INSERT INTO sb_sec.buf VALUES ('ok 1', 1), ('ok 2', 2), ('not ok', 4);
RESET ROLE;
SELECT sb_flush_all('buf');
SELECT wait_until($$ (SELECT count(*) FROM sb_sec.guarded) = 2
  AND (SELECT failures > 0 FROM sb_keys('sb_sec.buf') WHERE key = 'not ok') $$);
SELECT * FROM guarded ORDER BY key;
SELECT key, count, last_error FROM sb_keys('buf') WHERE count > 0;
RESET ROLE;

RESET search_path;
SET client_min_messages = warning;
DROP SCHEMA sb_sec, sb_strange CASCADE;
DROP FOREIGN DATA WRAPPER other_wrapper CASCADE;
DROP OWNED BY regress_sb_owner, regress_sb_member, regress_sb_app,
  regress_sb_reader, regress_sb_stranger, regress_sb_monitor;
DROP ROLE regress_sb_owner, regress_sb_member, regress_sb_app,
  regress_sb_reader, regress_sb_stranger, regress_sb_monitor;
