--
-- convert: what a buffer holds when the types of its key columns are altered
--
SET statement_timeout = '2min';
SET TimeZone = 'UTC';
SET DateStyle = 'ISO';

CREATE FUNCTION failed(buffer regclass, n int) RETURNS boolean LANGUAGE sql AS $$
  SELECT wait_until(format('(SELECT count(*) = %s FROM sb_keys(%L) WHERE last_error ~ ''could not convert'' AND failures > 0)', n, buffer))
$$;

-- Without notices: the handlers do not matter here.
SET client_min_messages = warning;

-- An integer becomes a bigint: nothing is lost from sight, and all is stored.
CREATE TABLE items (id int PRIMARY KEY, views bigint NOT NULL DEFAULT 0);
SELECT sb_create('views', 'items', 'views', 'interval=1h', 'timeout=1h');
INSERT INTO items VALUES (1, 1000);
INSERT INTO views SELECT i, i FROM generate_series(1, 5) i;
ALTER TABLE items ALTER id TYPE bigint;
ALTER FOREIGN TABLE views ALTER id TYPE bigint;
SELECT * FROM views ORDER BY id;
SELECT sb_count(3, 'views'), sb_total(1, 'views'), sb_total(5, 'views');
SELECT key, count FROM sb_keys('views') WHERE count <> 0 ORDER BY key;
SELECT keys >= 5 AS held, pending, increments, state IN ('idle', 'running') AS sound
  FROM sb_stat_buffers WHERE buffer = 'views';
INSERT INTO views VALUES (1, 10), (5000000000, 7);
SELECT sb_drain('views');
SELECT * FROM items ORDER BY id;
SELECT count(*) FROM views;

-- In the transaction it is seen as well, and undone with it, step by step.
INSERT INTO views VALUES (1, 1), (2, 2);
BEGIN;
ALTER FOREIGN TABLE views ALTER id TYPE text;
SELECT * FROM views ORDER BY id;
INSERT INTO views VALUES ('one', 100);
SAVEPOINT s;
ALTER FOREIGN TABLE views ALTER id TYPE numeric(10, 1), ALTER id SET NOT NULL;
SELECT * FROM views ORDER BY id;
SELECT sb_count(2, 'views');
ROLLBACK TO s;
SELECT * FROM views ORDER BY id;
SELECT sb_count('2', 'views');
ROLLBACK;
SELECT * FROM views ORDER BY id;
BEGIN;
SAVEPOINT s;
ALTER FOREIGN TABLE views ALTER id TYPE text;
RELEASE s;
ALTER FOREIGN TABLE views ALTER id TYPE numeric(10, 1);
SAVEPOINT t;
ALTER FOREIGN TABLE views ALTER id TYPE date;
ROLLBACK TO t;
COMMIT;
SELECT * FROM views ORDER BY id;
ALTER FOREIGN TABLE views ALTER id TYPE int;
SELECT * FROM views ORDER BY id;
-- What is counted in the transaction before is no other key afterwards.
BEGIN;
INSERT INTO views VALUES (3, 3);
SAVEPOINT s;
ALTER FOREIGN TABLE views ALTER id TYPE bigint;
ROLLBACK TO s;
COMMIT;
BEGIN;
INSERT INTO views VALUES (3, 3);
ALTER FOREIGN TABLE views ALTER id TYPE bigint;
COMMIT;
SELECT * FROM views ORDER BY id;
BEGIN;
ALTER FOREIGN TABLE views ALTER id TYPE bigint;
TRUNCATE views;
INSERT INTO views VALUES (8, 8);
SELECT * FROM views;
ROLLBACK;
BEGIN;
TRUNCATE views;
ALTER FOREIGN TABLE views ALTER id TYPE bigint;
INSERT INTO views VALUES (9, 9);
COMMIT;
SELECT * FROM views;
SELECT pending FROM sb_stat_buffers WHERE buffer = 'views';
DROP FOREIGN TABLE views;

-- Several keys become one; what does not fit stays, and says why.
CREATE FOREIGN TABLE words (a text, b text NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (interval '1h', timeout '1h', handler 'store_words');
CREATE TABLE stored (key text, n bigint);
CREATE FUNCTION store_words(a int, b text, n bigint) RETURNS void LANGUAGE sql AS
  $$ INSERT INTO stored VALUES (concat(a, '/', b), n) $$;
INSERT INTO words VALUES ('7', 'x', 1), (' 7', 'x', 2), ('seven', 'x', 4), (NULL, 'y', 8), ('99999999999', 'z', 16);
ALTER FOREIGN TABLE words ALTER a TYPE int;
SELECT * FROM words ORDER BY a, b;
SELECT sb_count('(7,x)', 'words'), sb_count(ROW(NULL::int, 'y'), 'words');
SELECT failed('words', 2);
SELECT key, count, failures > 0 AS failed, last_error FROM sb_keys('words') WHERE count <> 0 ORDER BY count;
SELECT wait_until('(SELECT last_error ~ ''^some keys were counted'' FROM sb_stat_buffers WHERE buffer = ''words'')');
SELECT state, pending, last_error FROM sb_stat_buffers WHERE buffer = 'words';
SELECT sb_flush_all('words') > 0 AS asked;
SELECT wait_until('(SELECT sum(n) = 11 FROM stored)');
SELECT * FROM stored ORDER BY n;
-- Under a third type, more of it fits; the rest does when it is altered back.
ALTER FOREIGN TABLE words ALTER a TYPE bigint;
SELECT * FROM words ORDER BY a, b;
ALTER FOREIGN TABLE words ALTER a TYPE text;
SELECT * FROM words ORDER BY a, b;
TRUNCATE words;
-- A column becomes NOT NULL, shorter, too long, or a domain.
INSERT INTO words VALUES (NULL, 'null', 1), ('abc', 'short', 2), ('abcdef', 'long', 4), ('abc   ', 'spaces', 8);
ALTER FOREIGN TABLE words ALTER a TYPE varchar(3), ALTER a SET NOT NULL;
SELECT * FROM words ORDER BY n;
CREATE DOMAIN short AS text CHECK (length(VALUE) < 4);
ALTER FOREIGN TABLE words ALTER a TYPE short;
SELECT * FROM words ORDER BY n;
ALTER FOREIGN TABLE words ALTER a TYPE text, ALTER a DROP NOT NULL;
SELECT * FROM words ORDER BY n;
TRUNCATE words;
INSERT INTO words VALUES (repeat('a', 1000), 'x', 1);
CREATE TYPE doubling AS (a text);
CREATE FUNCTION to_doubling(text) RETURNS doubling LANGUAGE sql AS $$ SELECT ROW($1 || $1 || $1)::doubling $$;
CREATE CAST (text AS doubling) WITH FUNCTION to_doubling AS ASSIGNMENT;
\set VERBOSITY terse
ALTER FOREIGN TABLE words ALTER a TYPE doubling;
\set VERBOSITY default
SELECT failed('words', 1);
SELECT left(key, 3) AS key, count, last_error FROM sb_keys('words') WHERE count <> 0;
TRUNCATE words;
-- A mere rename, or NOT NULL alone, converts nothing.
INSERT INTO words VALUES (NULL, 'x', 1);
ALTER FOREIGN TABLE words RENAME a TO c;
ALTER FOREIGN TABLE words ALTER b DROP NOT NULL;
SELECT * FROM words;
DROP FOREIGN TABLE words;
DROP CAST (text AS doubling);
DROP FUNCTION to_doubling(text);
DROP TYPE doubling;

-- All kinds of types
CREATE TYPE mood AS ENUM ('fine', 'bad');
CREATE TYPE feeling AS ENUM ('bad', 'fine', 'new');
CREATE TYPE pair AS (a int, b text);
CREATE TYPE couple AS (a text, b varchar(10));
CREATE FOREIGN TABLE kinds (m mood, p pair, ps pair[], at timestamptz, i int[], j jsonb, c char(5), f float8, x int,
                            n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (interval '1h', timeout '1h');
INSERT INTO kinds VALUES ('fine', ROW(1, 'one'), ARRAY[ROW(2, 'two')::pair, NULL], '2026-11-28 23:30:00+00', '{1,2}',
                          '{"a": 1}', 'abc', 1.5, NULL);
SET TimeZone = 'Europe/Zurich';
ALTER FOREIGN TABLE kinds ALTER m TYPE feeling, ALTER p TYPE couple, ALTER ps TYPE text, ALTER at TYPE date, ALTER i TYPE text[],
  ALTER j TYPE text, ALTER c TYPE text, ALTER f TYPE int, ALTER x TYPE bigint;
SELECT * FROM kinds;
RESET TimeZone;
ALTER FOREIGN TABLE kinds ALTER m TYPE mood, ALTER p TYPE pair, ALTER ps TYPE pair[], ALTER at TYPE timestamptz, ALTER i TYPE int[],
  ALTER j TYPE jsonb, ALTER c TYPE char(5), ALTER f TYPE float8, ALTER x TYPE int;
SELECT n, ps, i, j, c FROM kinds;
-- A row type whose fields were added or dropped since is read as it is now.
ALTER TYPE pair ADD ATTRIBUTE c text;
ALTER FOREIGN TABLE kinds ALTER p TYPE text;
SELECT n, p, ps FROM kinds;
-- A type that is dropped
DROP TYPE mood CASCADE;
SELECT failed('kinds', 1);
SELECT left(key, 2) AS bytes, count, last_error FROM sb_keys('kinds') WHERE count <> 0;
TRUNCATE kinds;
SELECT key, count FROM sb_keys('kinds') WHERE count <> 0;
DROP FOREIGN TABLE kinds;
DROP TYPE feeling, pair, couple;

-- Columns that are added, dropped or made anew are not altered ones.
CREATE FOREIGN TABLE columns (a int, b int, n bigint NOT NULL DEFAULT 1) SERVER statbuffer OPTIONS (interval '1h', timeout '1h');
INSERT INTO columns VALUES (1, 2, 3);
ALTER FOREIGN TABLE columns DROP a;
ALTER FOREIGN TABLE columns DROP n, ADD c text, ADD n bigint NOT NULL DEFAULT 1;
INSERT INTO columns VALUES (4, 'five', 6);
SELECT * FROM columns;
SELECT failed('columns', 1);
SELECT key, count, last_error FROM sb_keys('columns') WHERE count <> 0 ORDER BY count;
ALTER FOREIGN TABLE columns DROP b, DROP c, DROP n, ADD a int, ADD b int, ADD n bigint NOT NULL DEFAULT 1;
SELECT * FROM columns;
ALTER FOREIGN TABLE columns ALTER a TYPE bigint;
SELECT * FROM columns;
DROP FOREIGN TABLE columns;

-- Counts that do not fit together: the key that finds no room stays.
CREATE FOREIGN TABLE big (k numeric, n bigint NOT NULL DEFAULT 1) SERVER statbuffer OPTIONS (interval '1h', timeout '1h');
SELECT sb_stop('big');
ALTER FOREIGN TABLE big OPTIONS (DROP stopped);
INSERT INTO big SELECT 1 + i * 0.1, 2305843009213693952 FROM generate_series(0, 3) i;
ALTER FOREIGN TABLE big ALTER k TYPE int;
SELECT k, n FROM big;
DROP FOREIGN TABLE big;

-- Casts run as the owner, and can do no more, whoever alters the columns.
CREATE ROLE regress_convert;
GRANT USAGE ON FOREIGN SERVER statbuffer TO regress_convert;
CREATE SCHEMA convert AUTHORIZATION regress_convert;
SET ROLE regress_convert;
CREATE FOREIGN TABLE convert.casted (k int, n bigint NOT NULL DEFAULT 1) SERVER statbuffer OPTIONS (interval '1h', timeout '1h');
CREATE TYPE convert.target AS ENUM ('1', '2', '3', '4');
CREATE FUNCTION convert.to_target(i int) RETURNS convert.target LANGUAGE plpgsql AS $$
BEGIN
  RAISE NOTICE '% is converted by %', i, current_user;
  CASE i
    WHEN 1 THEN SET LOCAL ROLE NONE;
    WHEN 2 THEN CREATE TEMP TABLE planted (i int);
    WHEN 3 THEN RAISE unique_violation USING MESSAGE = 'three is no target';
    WHEN 5 THEN PERFORM pg_sleep(600);
    ELSE NULL;
  END CASE;
  RETURN i::text::convert.target;
END
$$;
RESET ROLE;
CREATE CAST (int AS convert.target) WITH FUNCTION convert.to_target AS ASSIGNMENT;
INSERT INTO convert.casted VALUES (1, 10), (2, 20), (3, 30), (4, 40);
ALTER FOREIGN TABLE convert.casted ALTER k TYPE convert.target;
SELECT * FROM convert.casted;
SELECT current_user = session_user AS same, to_regclass('planted');
TRUNCATE convert.casted;
ALTER FOREIGN TABLE convert.casted ALTER k TYPE int;
INSERT INTO convert.casted VALUES (4, 40);
SET client_min_messages = notice;
ALTER FOREIGN TABLE convert.casted ALTER k TYPE convert.target;
SET client_min_messages = warning;
ALTER FOREIGN TABLE convert.casted ALTER k TYPE int;
-- A cancel is no failure of a key: the statement fails, and all is as it was.
INSERT INTO convert.casted VALUES (5, 50);
SET statement_timeout = '500ms';
ALTER FOREIGN TABLE convert.casted ALTER k TYPE convert.target;
SET statement_timeout = '2min';
SELECT * FROM convert.casted ORDER BY k;
SELECT count(*) AS keys, sum(count) FROM sb_keys('convert.casted') WHERE count <> 0;
-- The code of a cast cannot alter the buffer in the meantime.
CREATE OR REPLACE FUNCTION convert.to_target(i int) RETURNS convert.target LANGUAGE plpgsql AS $$
BEGIN
  ALTER FOREIGN TABLE convert.casted ALTER k TYPE text;
  RETURN i::text::convert.target;
END
$$;
ALTER FOREIGN TABLE convert.casted ALTER k TYPE convert.target;
SELECT * FROM convert.casted;
DROP FOREIGN TABLE convert.casted;
DROP CAST (int AS convert.target);
DROP FUNCTION convert.to_target(int);
DROP TYPE convert.target;
DROP SCHEMA convert;
REVOKE USAGE ON FOREIGN SERVER statbuffer FROM regress_convert;
DROP ROLE regress_convert;

DROP DOMAIN short;
DROP FUNCTION store_words(int, text, bigint);
DROP FUNCTION failed(regclass, int);
DROP TABLE stored, items;
