--
-- durable: what is counted in a durable buffer is in the ledger, too.  What a
-- crash leaves is tested in t/.
--
\pset footer off
CREATE TABLE page_views (path text PRIMARY KEY, views bigint NOT NULL DEFAULT 0);
SELECT sb_create('hits', 'page_views', 'views', 'durable=true', 'interval=1h');

-- The ledger's tables cannot be read, written or refreshed, nor published.
SELECT * FROM sb_ledger_0;
INSERT INTO sb_ledger_0 VALUES (1, 2, '');
TRUNCATE sb_ledger_1;
REFRESH MATERIALIZED VIEW sb_ledger_0;
REFRESH MATERIALIZED VIEW sb_ledger_epochs WITH NO DATA;
SELECT * FROM sb_ledger_rows();
COPY sb_ledger_prepared FROM stdin;
\.

-- What is counted, outside of transactions, flushed and truncated.
INSERT INTO hits VALUES ('/home', 1), ('/about', 5);
BEGIN;
INSERT INTO hits VALUES ('/home', 100);
SELECT sb_async_increment('/lost', 7, 'hits');
ROLLBACK;
SELECT * FROM hits ORDER BY path;
SELECT sb_drain('hits');
SELECT * FROM page_views ORDER BY path;
SELECT sb_total('/home', 'hits');
BEGIN READ ONLY;
SELECT sb_increment('/home', buffer => 'hits');
COMMIT;
SELECT sb_count('/home', 'hits');
TRUNCATE hits;
SELECT coalesce(sb_count('/home', 'hits'), 0) AS count;

-- An increment outside of the transaction does not depend on whether that makes
-- the buffer another one.
BEGIN;
TRUNCATE hits;
SELECT sb_async_increment('/home', 1, 'hits');
ROLLBACK;
BEGIN;
ALTER FOREIGN TABLE hits OPTIONS (SET durable 'false');
SELECT sb_async_increment('/home', 1, 'hits');
ROLLBACK;
BEGIN;
CREATE FOREIGN TABLE other (path text NOT NULL, n bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (durable 'true', handler 'no_such_function', interval '1h');
SELECT sb_async_increment('/home', 1, 'other');
ROLLBACK;

-- Switching it on and off, with counts, and in savepoints.
INSERT INTO hits VALUES ('/on', 3);
ALTER FOREIGN TABLE hits OPTIONS (SET durable 'false');
INSERT INTO hits VALUES ('/off', 4);
BEGIN;
SAVEPOINT a;
ALTER FOREIGN TABLE hits OPTIONS (SET durable 'true');
ROLLBACK TO a;
INSERT INTO hits VALUES ('/off', 5);
COMMIT;
ALTER FOREIGN TABLE hits OPTIONS (SET durable 'true');
INSERT INTO hits VALUES ('/on', 6);
BEGIN;
ALTER FOREIGN TABLE hits OPTIONS (SET durable 'false');
ALTER FOREIGN TABLE hits OPTIONS (SET durable 'true');
INSERT INTO hits VALUES ('/both', 1);
COMMIT;
SELECT * FROM hits ORDER BY path;
SELECT sb_drain('hits');
SELECT * FROM page_views ORDER BY path;
ALTER FOREIGN TABLE hits OPTIONS (SET durable 'perhaps');

DROP FOREIGN TABLE hits;
DROP TABLE page_views;
