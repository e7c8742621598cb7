--
-- privileges: as relations have them
--
SET statement_timeout = '2min';

SET client_min_messages = error;
DROP ROLE IF EXISTS regress_sb_owner, regress_sb_app, regress_sb_reader,
  regress_sb_stranger, regress_sb_monitor, regress_sb_group, regress_sb_nologin;
RESET client_min_messages;
CREATE ROLE regress_sb_owner LOGIN;
CREATE ROLE regress_sb_app;
CREATE ROLE regress_sb_reader;
CREATE ROLE regress_sb_stranger;
CREATE ROLE regress_sb_monitor IN ROLE pg_read_all_stats;
CREATE ROLE regress_sb_group;
CREATE ROLE regress_sb_nologin NOLOGIN;
CREATE SCHEMA sb_priv AUTHORIZATION regress_sb_owner;
GRANT USAGE ON SCHEMA sb_priv TO PUBLIC;
GRANT CREATE ON SCHEMA sb_priv TO regress_sb_stranger, regress_sb_group, regress_sb_nologin;
SET search_path = sb_priv, public;

-- To create a buffer needs USAGE on the server.
SET ROLE regress_sb_owner;
CREATE FOREIGN TABLE buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer;
\echo :LAST_ERROR_SQLSTATE
RESET ROLE;
GRANT USAGE ON FOREIGN SERVER statbuffer TO regress_sb_owner;

SET ROLE regress_sb_owner;
CREATE TABLE stored (key text, total bigint, by_user name, by_session name);
CREATE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql AS $$
  INSERT INTO sb_priv.stored VALUES (key, counter, current_user, session_user)
$$;
CREATE FOREIGN TABLE buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer
  OPTIONS (handler 'sb_priv.store', interval '1h', timeout '1h', backoff '1h');
GRANT INSERT ON buf TO regress_sb_app;
GRANT SELECT ON buf TO regress_sb_reader;
SELECT sb_increment('k', 1, 'buf');

-- INSERT allows to count, and nothing else.
SET ROLE regress_sb_app;
SELECT sb_increment('k', 1, 'buf');
SELECT sb_async_increment('k', 1, 'buf');
INSERT INTO buf VALUES ('k', 1);
SELECT sb_count('k', 'buf');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM buf;
SELECT * FROM sb_keys('buf');
INSERT INTO buf VALUES ('k', 1) RETURNING *;
SELECT sb_flush('k', 'buf');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_flush_all('buf');
SELECT sb_drain('buf');
SELECT sb_start('buf');
SELECT sb_stop('buf');
SELECT sb_stat_reset('buf');
TRUNCATE buf;
ALTER FOREIGN TABLE buf OPTIONS (SET interval '1s');
DROP FOREIGN TABLE buf;

-- SELECT allows to read.
SET ROLE regress_sb_reader;
SELECT sb_count('k', 'buf');
SELECT * FROM buf;
SELECT key, count FROM sb_keys('buf');
SELECT sb_increment('k', 1, 'buf');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_async_increment('k', 1, 'buf');
INSERT INTO buf VALUES ('k', 1);
SELECT sb_flush('k', 'buf');
SELECT sb_flush_all('buf');
SELECT sb_drain('buf');
SELECT sb_start('buf');
SELECT sb_stop('buf');
SELECT sb_stat_reset('buf');
TRUNCATE buf;

-- Who has neither may do nothing.
SET ROLE regress_sb_stranger;
SELECT sb_increment('k', 1, 'buf');
SELECT sb_async_increment('k', 1, 'buf');
SELECT sb_count('k', 'buf');
SELECT * FROM buf;
SELECT * FROM sb_keys('buf');
SELECT sb_flush('k', 'buf');
SELECT sb_drain('buf');
-- A privilege on a column is none on the buffer.
SET ROLE regress_sb_owner;
GRANT INSERT (key), SELECT (key) ON buf TO regress_sb_stranger;
SET ROLE regress_sb_stranger;
SELECT sb_increment('k', 1, 'buf');
SELECT sb_count('k', 'buf');
SELECT key FROM buf;
SELECT count FROM buf;
SET ROLE regress_sb_owner;
REVOKE INSERT (key), SELECT (key) ON buf FROM regress_sb_stranger;

-- TRUNCATE has a privilege of its own.
GRANT TRUNCATE ON buf TO regress_sb_app;
SET ROLE regress_sb_app;
BEGIN;
TRUNCATE buf;
ROLLBACK;

-- The owner may do everything, and so may who is a member of it or a superuser.
SET ROLE regress_sb_owner;
SELECT sb_count('k', 'buf');
SELECT sb_flush('none', 'buf');
SELECT sb_start('buf');
RESET ROLE;
GRANT regress_sb_owner TO regress_sb_group;
SET ROLE regress_sb_group;
SELECT sb_count('k', 'buf');
SELECT sb_flush('none', 'buf');
SELECT sb_start('buf');
RESET ROLE;
SELECT sb_drain('buf');
-- The handler ran as the owner, whoever counted and whoever asked.
SELECT * FROM stored;
TRUNCATE stored;

-- A right that is taken away is gone with the next increment.
SET ROLE regress_sb_app;
SELECT sb_increment('k', 1, 'buf');
RESET ROLE;
REVOKE INSERT ON buf FROM regress_sb_app;
SET ROLE regress_sb_app;
SELECT sb_increment('k', 1, 'buf');
RESET ROLE;
GRANT INSERT ON buf TO PUBLIC;
SET ROLE regress_sb_stranger;
SELECT sb_increment('k', 1, 'buf');
RESET ROLE;
REVOKE INSERT ON buf FROM PUBLIC;
GRANT INSERT ON buf TO regress_sb_app;
SELECT sb_count('k', 'buf');
-- Also within one statement that changes the role.
CREATE FUNCTION count_as_owner(key text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
AS $$ BEGIN PERFORM sb_increment(key, 1, 'sb_priv.buf'); END $$;
ALTER FUNCTION count_as_owner OWNER TO regress_sb_owner;
SET ROLE regress_sb_stranger;
SELECT count_as_owner('k');
SELECT count_as_owner('k'), sb_increment('k', 1, 'buf');
RESET ROLE;
DROP FUNCTION count_as_owner;
SELECT sb_count('k', 'buf');
-- A view counts by its owner's rights.
SET ROLE regress_sb_owner;
CREATE VIEW buf_view AS SELECT * FROM buf;
GRANT INSERT, SELECT ON buf_view TO regress_sb_stranger;
SET ROLE regress_sb_stranger;
INSERT INTO buf_view VALUES ('k', 1);
SELECT * FROM buf_view;
RESET ROLE;
DROP VIEW buf_view;
TRUNCATE buf;

-- Errors may tell a secret: they are for the owner, and for who reads all
-- statistics.
SET ROLE regress_sb_owner;
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE plpgsql
AS $$ BEGIN RAISE 'a secret'; END $$;
SELECT sb_increment('k', 1, 'buf');
SELECT sb_flush('k', 'buf');
SELECT wait_until($$ (SELECT failures > 0 AND last_error IS NOT NULL FROM sb_keys('buf') WHERE key = 'k') $$);
GRANT SELECT ON buf TO regress_sb_monitor;
SELECT 'owner' AS who, state, failures > 0 AS failed, last_error FROM sb_stat_buffers
  WHERE buffer = 'buf';
SELECT 'owner' AS who, key, last_error FROM sb_keys('buf') WHERE failures > 0;
SET ROLE regress_sb_monitor;
SELECT 'monitor' AS who, state, failures > 0 AS failed, last_error FROM sb_stat_buffers
  WHERE buffer = 'buf';
SELECT 'monitor' AS who, key, last_error FROM sb_keys('buf') WHERE failures > 0;
SET ROLE regress_sb_group;
SELECT 'member' AS who, state, failures > 0 AS failed, last_error FROM sb_stat_buffers
  WHERE buffer = 'buf';
SET ROLE regress_sb_reader;
SELECT 'reader' AS who, state, failures > 0 AS failed, last_error FROM sb_stat_buffers
  WHERE buffer = 'buf';
SELECT 'reader' AS who, key, last_error FROM sb_keys('buf') WHERE failures > 0;
SET ROLE regress_sb_stranger;
SELECT 'stranger' AS who, state, last_error FROM sb_stat_buffers WHERE buffer = 'buf';
RESET ROLE;
SELECT 'superuser' AS who, state, failures > 0 AS failed, last_error FROM sb_stat_buffers
  WHERE buffer = 'buf';
TRUNCATE buf;

-- The handler must be the owner's, of a role that the owner is a member of,
-- or of a superuser.
CREATE FUNCTION store_super(key text, counter bigint) RETURNS void LANGUAGE sql AS '';
SET ROLE regress_sb_stranger;
CREATE FUNCTION store_stranger(key text, counter bigint) RETURNS void LANGUAGE sql AS '';
SET ROLE regress_sb_owner;
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'sb_priv.store_super');
SELECT sb_start('buf');
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'sb_priv.store_stranger');
SELECT sb_start('buf');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_stat_reset('buf');
SELECT sb_increment('k', 7, 'buf');
SELECT sb_flush_all('buf');
SELECT wait_until($$ (SELECT last_error IS NOT NULL FROM sb_stat_buffers
                      WHERE buffer = 'buf') $$);
SELECT state, last_error FROM sb_stat_buffers WHERE buffer = 'buf';
SELECT sb_count('k', 'buf');
RESET ROLE;
GRANT regress_sb_stranger TO regress_sb_owner;
SET ROLE regress_sb_owner;
SELECT sb_start('buf');
SELECT sb_drain('buf');
RESET ROLE;
REVOKE regress_sb_stranger FROM regress_sb_owner;
-- The owner needs EXECUTE.
REVOKE EXECUTE ON FUNCTION store_super FROM PUBLIC;
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'sb_priv.store_super');
SET ROLE regress_sb_owner;
SELECT sb_start('buf');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_stat_reset('buf');
SELECT sb_increment('k', 7, 'buf');
SELECT sb_flush_all('buf');
SELECT wait_until($$ (SELECT last_error IS NOT NULL FROM sb_stat_buffers
                      WHERE buffer = 'buf') $$);
SELECT state, last_error FROM sb_stat_buffers WHERE buffer = 'buf';
RESET ROLE;
GRANT EXECUTE ON FUNCTION store_super TO regress_sb_owner;
SELECT sb_start('buf');
SELECT sb_drain('buf');

-- It can do what the owner can and no more.
CREATE TABLE only_super (key text);
SET ROLE regress_sb_owner;
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE plpgsql
AS $$ BEGIN INSERT INTO sb_priv.only_super VALUES (key); END $$;
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'sb_priv.store');
SELECT sb_increment('k', 7, 'buf');
SELECT sb_flush('k', 'buf');
SELECT wait_until($$ (SELECT failures > 0 AND last_error IS NOT NULL FROM sb_keys('buf') WHERE key = 'k') $$);
SELECT last_error FROM sb_keys('buf') WHERE failures > 0;
-- Not even by changing its role back.
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE plpgsql
AS $$ BEGIN RESET ROLE; RESET SESSION AUTHORIZATION; INSERT INTO sb_priv.only_super VALUES (key); END $$;
SELECT sb_flush('k', 'buf');
SELECT wait_until($$ (SELECT failures > 1 FROM sb_keys('buf') WHERE key = 'k') $$);
SELECT last_error FROM sb_keys('buf') WHERE failures > 0;
RESET ROLE;
TABLE only_super;
TRUNCATE buf;

-- With another owner it runs as that.
ALTER ROLE regress_sb_group LOGIN;
REVOKE regress_sb_owner FROM regress_sb_group;
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql AS $$
  INSERT INTO sb_priv.stored VALUES (key, counter, current_user, session_user)
$$;
ALTER FUNCTION store(text, bigint) OWNER TO CURRENT_USER;
GRANT ALL ON stored TO regress_sb_group;
INSERT INTO buf VALUES ('k', 1);
ALTER FOREIGN TABLE buf OWNER TO regress_sb_group;
SET ROLE regress_sb_owner;
SELECT sb_flush('k', 'buf');
SET ROLE regress_sb_group;
SELECT sb_increment('k', 2, 'buf');
SELECT sb_drain('buf');
RESET ROLE;
SELECT key, sum(total), by_user FROM stored GROUP BY key, by_user;
SELECT owner FROM sb_stat_buffers WHERE buffer = 'buf';

-- Before version 17 no worker can connect as a role that may not log in.  Since
-- then it can: the start succeeds, and the error is only written by us.
SELECT current_setting('server_version_num')::int < 170000 AS needs_login
\gset
GRANT USAGE ON FOREIGN SERVER statbuffer TO regress_sb_nologin;
SET ROLE regress_sb_nologin;
CREATE FOREIGN TABLE nologin_buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'sb_priv.store_any', interval '1h');
CREATE FUNCTION store_any(key text, counter bigint) RETURNS void LANGUAGE sql AS '';
\set ECHO none
\if :needs_login
SELECT sb_start('nologin_buf');
\else
SELECT sb_start('nologin_buf') \g /dev/null
\echo 'ERROR:  role "regress_sb_nologin" is not permitted to log in'
\echo 'DETAIL:  The worker of a buffer connects as the buffer\'s owner.'
\echo 'HINT:  Grant the role the LOGIN privilege (it needs no password), or change the owner of the buffer.'
\endif
\set ECHO all
RESET ROLE;
ALTER ROLE regress_sb_nologin LOGIN;
SELECT sb_start('nologin_buf');
DROP FOREIGN TABLE nologin_buf;

-- The default buffer belongs to who started it first.  Others may not start it.
SET ROLE regress_sb_owner;
CREATE FUNCTION handle_flush(key text, counter bigint) RETURNS void LANGUAGE sql AS '';
\set VERBOSITY sqlstate
SELECT sb_start();
\set VERBOSITY default
RESET ROLE;
GRANT CREATE ON SCHEMA public TO regress_sb_owner;
SET ROLE regress_sb_owner;
SELECT sb_start();
SELECT sb_increment('mykey');
SELECT sb_count('mykey');
SET ROLE regress_sb_group;
SELECT sb_start();
SELECT sb_increment('mykey');
SELECT sb_count('mykey');
SELECT sb_drain();
SELECT sb_stop();
SELECT * FROM sb_keys();
RESET ROLE;
SELECT owner FROM sb_stat_buffers WHERE buffer = 'sb_default';
DROP FOREIGN TABLE sb_default;

DROP FOREIGN TABLE buf;
RESET search_path;
SET client_min_messages = warning;
DROP SCHEMA sb_priv CASCADE;
DROP OWNED BY regress_sb_owner, regress_sb_app, regress_sb_reader,
  regress_sb_stranger, regress_sb_monitor, regress_sb_group, regress_sb_nologin;
DROP ROLE regress_sb_owner, regress_sb_app, regress_sb_reader,
  regress_sb_stranger, regress_sb_monitor, regress_sb_group, regress_sb_nologin;
