--
-- default_buffer: one buffer, in the fewest words
--

-- Without a handler there is nothing to start, and nothing is made.
SELECT sb_start();
\echo :LAST_ERROR_SQLSTATE
SELECT to_regclass('sb_default');

-- One with other arguments, or which returns something else, does not help.
CREATE FUNCTION handle_flush(key int, counter int) RETURNS void
LANGUAGE sql AS '';
SELECT sb_start();
CREATE FUNCTION handle_flush(key text, counter bigint) RETURNS int
LANGUAGE sql AS 'SELECT 1';
SELECT sb_start();
SELECT to_regclass('sb_default');
DROP FUNCTION handle_flush(int, int), handle_flush(text, bigint);

-- The first on the search path is taken, and it is told where it stands.
CREATE SCHEMA "My app";
SET search_path = "My app", public;
CREATE TABLE stored (key text PRIMARY KEY, total bigint NOT NULL);
CREATE FUNCTION handle_flush(key text, counter bigint) RETURNS void
LANGUAGE sql AS $$
  INSERT INTO "My app".stored VALUES (key, counter)
  ON CONFLICT (key) DO UPDATE SET total = stored.total + EXCLUDED.total
$$;

-- What is rolled back is not there.
BEGIN;
SELECT sb_start();
SELECT sb_increment('mykey');
SELECT sb_count('mykey');
ROLLBACK;
SELECT to_regclass('public.sb_default');
SELECT sb_increment('mykey');

-- It stands in the extension's schema, wherever the caller makes things.
SELECT sb_start();
SELECT c.relnamespace::regnamespace AS schema, c.relname,
       c.relowner = current_user::regrole AS owned_by_caller,
       s.srvname, t.ftoptions
  FROM pg_class c
    JOIN pg_foreign_table t ON t.ftrelid = c.oid
    JOIN pg_foreign_server s ON s.oid = t.ftserver
  WHERE c.relname = 'sb_default';
SELECT attname, format_type(atttypid, atttypmod), attnotnull,
       pg_get_expr(adbin, adrelid) AS default
  FROM pg_attribute a
    LEFT JOIN pg_attrdef d ON adrelid = attrelid AND adnum = attnum
  WHERE attrelid = 'public.sb_default'::regclass AND attnum > 0
  ORDER BY attnum;

-- It is the user's own and no part of the extension.
SELECT deptype FROM pg_depend
  WHERE classid = 'pg_class'::regclass AND deptype = 'e'
    AND objid = 'public.sb_default'::regclass;

-- A second start is fine and changes nothing.
SELECT 'public.sb_default'::regclass::oid AS before \gset
SELECT sb_start();
SELECT sb_start(NULL);
SELECT sb_start('sb_default');
SELECT 'public.sb_default'::regclass::oid = :before AS the_same;

-- Every function means it when no buffer is named.
ALTER FOREIGN TABLE public.sb_default
  OPTIONS (ADD interval '1h', ADD timeout '1h');
SELECT sb_increment('mykey');
SELECT sb_increment('mykey', 10);
SELECT sb_increment('mykey', 10, NULL);
SELECT sb_async_increment('mykey');
SELECT sb_async_increment('mykey', 10);
SELECT sb_count('mykey');
SELECT sb_increment(42);
SELECT sb_count(42);
SELECT key, count, in_flight, failures, last_error FROM sb_keys() ORDER BY key;
INSERT INTO sb_default VALUES ('mykey');
INSERT INTO sb_default VALUES ('mykey', 7);
SELECT * FROM sb_default ORDER BY key;

-- The handler is found although it is on nobody's search path any more.
RESET search_path;
SELECT sb_flush('mykey');
SELECT wait_until($$ EXISTS (SELECT FROM "My app".stored WHERE key = 'mykey') $$);
SELECT sb_flush_all() > 0 AS asked;
SELECT wait_until($$ EXISTS (SELECT FROM "My app".stored WHERE key = '42') $$);
SELECT sb_increment('other');
SELECT sb_drain();
SELECT * FROM "My app".stored ORDER BY key;
SELECT sb_count('mykey') AS mykey, sb_count('other') AS other;
SELECT sb_stat_reset();
SELECT increments FROM sb_stat_buffers WHERE buffer = 'sb_default';

-- Stopped and started without a name, too.
SELECT sb_stop();
SELECT sb_increment('mykey');
SELECT sb_start();
SELECT sb_increment('mykey');
SELECT sb_count('mykey');
SELECT sb_drain();

-- Under another name it is a buffer, but not the default one.
ALTER FOREIGN TABLE sb_default RENAME TO renamed;
SELECT sb_increment('mykey');
SELECT sb_increment('mykey', buffer => 'renamed');
SELECT sb_count('mykey', 'renamed');
ALTER FOREIGN TABLE renamed RENAME TO sb_default;
SELECT sb_count('mykey');

-- What else has its name is not taken for one.
DROP FOREIGN TABLE sb_default;
CREATE TABLE sb_default (key text, count bigint);
SELECT sb_start();
SELECT sb_increment('mykey');
DROP TABLE sb_default;

-- To the one that is made after it, nothing came over.
SET search_path = "My app", public;
SELECT sb_start();
SELECT sb_count('mykey');
DROP FOREIGN TABLE sb_default;

-- A handler that takes many keys a call is found as well.
CREATE FUNCTION handle_flush(keys text[], counters bigint[]) RETURNS boolean
LANGUAGE sql AS 'SELECT true';
DROP FUNCTION handle_flush(text, bigint);
SELECT sb_start();
SELECT ftoptions FROM pg_foreign_table WHERE ftrelid = 'sb_default'::regclass;
RESET search_path;

-- The extension does not go away under a buffer.
DROP EXTENSION statbuffer;
DROP FOREIGN TABLE sb_default;

-- In a schema of its own the extension has its default buffer there.
DROP EXTENSION statbuffer;
CREATE SCHEMA counting;
CREATE EXTENSION statbuffer SCHEMA counting;
CREATE FUNCTION handle_flush(key text, counter bigint) RETURNS void
LANGUAGE sql AS '';
-- What PostgreSQL tells besides is another in 19.
\set VERBOSITY terse
SELECT sb_increment('mykey');
\set VERBOSITY default
SELECT counting.sb_start();
ALTER FOREIGN TABLE counting.sb_default
  OPTIONS (ADD interval '1h', ADD timeout '1h');
SELECT counting.sb_increment('mykey');
SELECT counting.sb_increment('mykey', 10);
SELECT counting.sb_count('mykey');
SELECT * FROM counting.sb_default;
SELECT ftoptions FROM pg_foreign_table
  WHERE ftrelid = 'counting.sb_default'::regclass;
SELECT buffer, keys, pending FROM counting.sb_stat_buffers;
SELECT counting.sb_drain();
SELECT counting.sb_count('mykey');

DROP EXTENSION statbuffer CASCADE;
CREATE EXTENSION statbuffer;
DROP SCHEMA counting;
DROP FUNCTION handle_flush(text, bigint);
DROP SCHEMA "My app" CASCADE;
