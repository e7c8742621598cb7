--
-- define: what CREATE and ALTER of a buffer tell at once, and what they refuse
--
SET statement_timeout = '2min';

-- The handler is not there, or another one is.
CREATE FUNCTION h_int(p_key text, p_counter int) RETURNS void LANGUAGE sql AS '';
CREATE FOREIGN TABLE buf (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'h_int');
\echo :SQLSTATE
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'h_none');
CREATE SCHEMA sb_define;
CREATE FUNCTION sb_define.h_int(p_key text, p_counter bigint) RETURNS void LANGUAGE sql AS '';
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'h_int');
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'public.h_int');
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'sb_define.h_int');
ALTER FOREIGN TABLE buf ALTER key TYPE int;
ALTER TABLE buf ALTER key TYPE text;
-- Many others.
CREATE FUNCTION h_many(int) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION h_many(int, int) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION h_many(int, int, int) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION h_many(int, int, int, int) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION h_many(int, int, int, int, int) RETURNS void LANGUAGE sql AS '';
\set VERBOSITY terse
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'h_many');
-- What sb_start() says of other handlers, and of targets.
\set VERBOSITY default
CREATE FUNCTION h_result(p_key text, p_counter bigint) RETURNS int LANGUAGE sql AS 'SELECT 1';
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'h_result');
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'no_schema.h');
ALTER FOREIGN TABLE buf OPTIONS (DROP handler, ADD target 'no_such_table');
CREATE TABLE no_such_table (key text PRIMARY KEY, m bigint NOT NULL);
ALTER FOREIGN TABLE buf OPTIONS (ADD interval '1h');
ALTER FOREIGN TABLE buf RENAME n TO m;
ALTER FOREIGN TABLE buf RENAME m TO n;
DROP TABLE no_such_table;
-- Nothing is told where it will be there later: while a dump is restored.
SET check_function_bodies = off;
ALTER FOREIGN TABLE buf OPTIONS (SET interval '2h');
RESET check_function_bodies;
-- In a transaction that fails, and in one that had failed.
BEGIN;
CREATE FOREIGN TABLE other (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'h_int');
ROLLBACK;
-- In a function.
DO $$ BEGIN ALTER FOREIGN TABLE buf OPTIONS (SET target 'not_there'); END $$;
DROP FOREIGN TABLE buf;
-- In a session that has not used the library yet.
\c -
CREATE FOREIGN TABLE buf (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'h_int');
\c -
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'h_none');
\c -
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'sb_define.h_int');
DROP FOREIGN TABLE buf;
DROP SCHEMA sb_define CASCADE;
DROP FUNCTION h_int(text, int), h_result(text, bigint), h_many(int), h_many(int, int), h_many(int, int, int),
  h_many(int, int, int, int), h_many(int, int, int, int, int);

-- A handler whose argument has the name of a column that it uses: sb_start() and
-- the same statements warn where that can be told, and last_error says what to do.
CREATE TABLE named (path text PRIMARY KEY, views bigint NOT NULL);
CREATE FUNCTION h_named(path text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO named VALUES (path, counter)
  ON CONFLICT (path) DO UPDATE SET views = named.views + EXCLUDED.views;
END $$;
CREATE FOREIGN TABLE buf (path text NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'h_named', interval '0', backoff '1h');
SELECT sb_start('buf');
\echo :SQLSTATE
INSERT INTO buf VALUES ('/');
SELECT wait_until($$ (SELECT last_error IS NOT NULL FROM sb_keys('buf')) $$);
SELECT key, count, last_error FROM sb_keys('buf');
CREATE OR REPLACE FUNCTION h_named(path text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
  INSERT INTO named VALUES ($1, counter)
  ON CONFLICT (path) DO UPDATE SET views = named.views + EXCLUDED.views;
END $$;
SELECT sb_start('buf');
SELECT sb_drain('buf');
TABLE named;
DROP FUNCTION h_named(text, bigint);
CREATE FUNCTION h_named(p_path text, p_counter bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO named VALUES (p_path, p_counter)
  ON CONFLICT (path) DO UPDATE SET views = named.views + EXCLUDED.views;
END $$;
SELECT sb_start('buf');
DROP FOREIGN TABLE buf;
DROP FUNCTION h_named(text, bigint);
DROP TABLE named;

-- What is a buffer stays one, and its count column the same.
SET client_min_messages = warning;
CREATE DOMAIN going AS text;
CREATE FOREIGN TABLE kept (a going, b bigint, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (interval '1h');
INSERT INTO kept VALUES ('a', 1, 5);
ALTER FOREIGN TABLE kept ADD c text;
\echo :LAST_ERROR_SQLSTATE
ALTER FOREIGN TABLE kept ADD c bigint;
ALTER TABLE kept ADD c bigint;
ALTER FOREIGN TABLE kept DROP n;
ALTER FOREIGN TABLE kept DROP b, DROP n;
ALTER FOREIGN TABLE kept DROP a, DROP b;
ALTER FOREIGN TABLE kept ALTER n TYPE int;
DO $$ BEGIN ALTER FOREIGN TABLE kept ADD c text; END $$;
-- By way of a partitioned table, and of a type.
CREATE TABLE parent (a text, b bigint, n bigint) PARTITION BY LIST (b);
ALTER FOREIGN TABLE kept ALTER a TYPE text;
ALTER TABLE parent ATTACH PARTITION kept DEFAULT;
ALTER TABLE parent ADD c text;
ALTER TABLE parent DETACH PARTITION kept;
DROP TABLE parent;
ALTER FOREIGN TABLE kept DROP b, ALTER a TYPE going;
DROP DOMAIN going CASCADE;
-- A key column more, as the hint says, and one less.
ALTER FOREIGN TABLE kept DROP n, ADD c text, ADD n bigint NOT NULL DEFAULT 1;
INSERT INTO kept VALUES ('x', 'y');
SELECT * FROM kept WHERE c = 'y';
ALTER FOREIGN TABLE kept DROP a;
INSERT INTO kept VALUES ('y');
SELECT * FROM kept;
-- What is held and does not fit any more is told, and kept.
SELECT sum(n) FROM kept;
ALTER FOREIGN TABLE kept ALTER c TYPE varchar(10);
INSERT INTO kept VALUES ('z', 2);
ALTER FOREIGN TABLE kept ALTER c TYPE text;
ALTER FOREIGN TABLE kept ALTER c SET NOT NULL, OPTIONS (SET interval '2h');
ALTER FOREIGN TABLE kept OPTIONS (SET interval '1h');
TRUNCATE kept;
ALTER FOREIGN TABLE kept ALTER c TYPE varchar(10);
-- With the table, everything goes.
CREATE SCHEMA sb_define;
ALTER FOREIGN TABLE kept SET SCHEMA sb_define;
DROP SCHEMA sb_define CASCADE;
DROP DOMAIN going;
RESET client_min_messages;
