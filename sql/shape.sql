--
-- shape: what is not a buffer says so at its first use
--

CREATE FUNCTION handle_flush(key text, counter bigint) RETURNS void
LANGUAGE sql AS '';

-- Fewer than two columns.
CREATE FOREIGN TABLE none () SERVER statbuffer;
CREATE FOREIGN TABLE one (count bigint) SERVER statbuffer;
SELECT sb_increment('k', buffer => 'none');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_increment('k', buffer => 'one');

-- The last column is not bigint, even if it looks like it or another one is.
CREATE FOREIGN TABLE by_int (key text, count int) SERVER statbuffer;
CREATE FOREIGN TABLE by_numeric (key text, count numeric) SERVER statbuffer;
CREATE FOREIGN TABLE turned (count bigint, key text) SERVER statbuffer;
CREATE DOMAIN posint AS bigint CHECK (VALUE > 0);
CREATE FOREIGN TABLE by_domain (key text, count posint) SERVER statbuffer;
SELECT sb_increment('k', buffer => 'by_int');
SELECT sb_increment('k', buffer => 'by_numeric');
SELECT sb_increment('k', buffer => 'turned');
SELECT sb_increment('k', buffer => 'by_domain');

-- A column that is computed cannot be counted by.
CREATE FOREIGN TABLE generated
  (key text, lower text GENERATED ALWAYS AS (lower(key)) STORED, count bigint)
  SERVER statbuffer;
SELECT sb_increment(ROW('k', 'k'), buffer => 'generated');

-- Every way to use it says the same.
SELECT sb_async_increment('k', buffer => 'one');
SELECT sb_count('k', 'one');
SELECT sb_flush('k', 'one');
SELECT sb_flush_all('one');
SELECT sb_drain('one');
SELECT sb_start('one');
SELECT sb_stop('one');
SELECT * FROM sb_keys('one');
SELECT sb_stat_reset('one');
SELECT * FROM one;
INSERT INTO one VALUES (1);
COPY one FROM stdin;
1
\.
TRUNCATE one;
EXPLAIN SELECT * FROM one;

-- It can be put right.
ALTER FOREIGN TABLE one ADD n bigint NOT NULL DEFAULT 1;
SELECT sb_increment(5::bigint, buffer => 'one');
SELECT * FROM one;
ALTER FOREIGN TABLE by_int ALTER count TYPE bigint;
SELECT sb_increment('k', buffer => 'by_int');
SELECT * FROM by_int;
ALTER FOREIGN TABLE generated DROP lower;
SELECT sb_increment('k', buffer => 'generated');
SELECT * FROM generated;

-- The view of operators shows all of them, and does not mind their shape.
SELECT buffer, state, keys FROM sb_stat_buffers
  WHERE buffer IN ('none', 'turned') ORDER BY buffer;

DROP FOREIGN TABLE none, one, by_int, by_numeric, turned, by_domain, generated;
DROP DOMAIN posint;

-- No buffers: a table, a view, a materialized view, an index, a sequence, a
-- partitioned table, a composite type, a catalog.
CREATE TABLE plain (key text PRIMARY KEY, count bigint);
CREATE VIEW a_view AS SELECT * FROM plain;
CREATE MATERIALIZED VIEW mat_view AS SELECT * FROM plain;
CREATE SEQUENCE seq;
CREATE TABLE parted (key text, count bigint) PARTITION BY LIST (key);
CREATE TYPE composite AS (key text, count bigint);
SELECT sb_increment('k', buffer => 'plain');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_async_increment('k', buffer => 'plain');
SELECT sb_count('k', 'plain');
SELECT sb_flush('k', 'plain');
SELECT sb_flush_all('plain');
SELECT sb_drain('plain');
SELECT sb_start('plain');
SELECT sb_stop('plain');
SELECT * FROM sb_keys('plain');
SELECT sb_stat_reset('plain');
SELECT sb_increment('k', buffer => 'a_view');
SELECT sb_increment('k', buffer => 'mat_view');
SELECT sb_increment('k', buffer => 'plain_pkey');
SELECT sb_increment('k', buffer => 'seq');
SELECT sb_increment('k', buffer => 'parted');
SELECT sb_increment('k', buffer => 'composite');
SELECT sb_increment('k', buffer => 'pg_class');

-- A view over a buffer is no buffer for the functions either.
CREATE FOREIGN TABLE buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (interval '1h');
CREATE VIEW buf_view AS SELECT * FROM buf;
SELECT sb_increment('k', buffer => 'buf_view');
DROP VIEW buf_view;
DROP FOREIGN TABLE buf;

-- Neither is a foreign table of somebody else, with or without a handler.
CREATE FOREIGN DATA WRAPPER other_wrapper;
CREATE SERVER other_server FOREIGN DATA WRAPPER other_wrapper;
CREATE FOREIGN TABLE other_table (key text, count bigint) SERVER other_server;
SELECT sb_increment('k', buffer => 'other_table');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_count('k', 'other_table');
SELECT buffer FROM sb_stat_buffers WHERE buffer = 'other_table';
DROP FOREIGN DATA WRAPPER other_wrapper CASCADE;

-- One with a handler comes with file_fdw, where it is installed.
SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'file_fdw') AS has_file_fdw
\gset
SET client_min_messages = warning;
\if :has_file_fdw
CREATE EXTENSION file_fdw;
CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;
CREATE FOREIGN TABLE a_file (key text, count bigint)
  SERVER files OPTIONS (filename '/dev/null');
\else
CREATE TABLE a_file (key text, count bigint);
\endif
SELECT sb_increment('k', buffer => 'a_file');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_keys('a_file');
SELECT buffer FROM sb_stat_buffers WHERE buffer = 'a_file';
\if :has_file_fdw
DROP EXTENSION file_fdw CASCADE;
\else
DROP TABLE a_file;
\endif
RESET client_min_messages;

-- A temporary foreign table there is not; a buffer in a schema of its own has
-- to be named with it.
CREATE SCHEMA deep;
CREATE FOREIGN TABLE deep."A Buffer" ("the key" text NOT NULL, "the count" bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (interval '1h');
SELECT sb_increment('k', buffer => 'A Buffer');
SELECT sb_increment('k', buffer => '"A Buffer"');
SELECT sb_increment('k', buffer => 'deep."A Buffer"');
SELECT sb_increment(NULL, buffer => 'deep."A Buffer"');
SELECT * FROM deep."A Buffer";
SELECT sb_drain('deep."A Buffer"');
SELECT sb_stop('deep."A Buffer"');
SELECT sb_increment('k', buffer => 'deep."A Buffer"');
SELECT sb_start('deep."A Buffer"');
SELECT sb_increment('k', buffer => 'deep."A Buffer"');

-- Renamed and moved, it is the same buffer with the same counts.
ALTER FOREIGN TABLE deep."A Buffer" SET SCHEMA public;
ALTER FOREIGN TABLE "A Buffer" RENAME TO buf;
ALTER FOREIGN TABLE buf RENAME "the key" TO key;
SELECT sb_increment('k', buffer => 'buf');
SELECT * FROM buf;
DROP FOREIGN TABLE buf;
DROP SCHEMA deep;

DROP TABLE parted;
DROP TYPE composite;
DROP SEQUENCE seq;
DROP TABLE plain CASCADE;
DROP FUNCTION handle_flush(text, bigint);
