--
-- async: what is counted outside the transaction must not depend on key
-- columns that may be rolled back
--
SET statement_timeout = '2min';

CREATE TABLE stored (key text, counter bigint);
CREATE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql AS
'INSERT INTO stored VALUES (key, counter)';
CREATE FUNCTION store(key int, counter bigint) RETURNS void LANGUAGE sql AS
'INSERT INTO stored VALUES (key, counter)';
CREATE FOREIGN TABLE buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h');

-- The columns are altered: in a buffer that was never used, and in one that was.
BEGIN;
ALTER FOREIGN TABLE buf ALTER key TYPE int;
SELECT sb_async_increment(5, 1, 'buf');
\echo :LAST_ERROR_SQLSTATE
ROLLBACK;
SELECT sb_async_increment('k', 1, 'buf');
BEGIN;
ALTER FOREIGN TABLE buf ALTER key TYPE int;
SAVEPOINT sp;
SELECT sb_async_increment(5, 1, 'buf');
ROLLBACK TO sp;
-- What is counted with the transaction is rolled back with it.
SELECT sb_increment(5, 1, 'buf');
ROLLBACK;
SELECT sb_drain('buf');
SELECT * FROM stored;
SELECT state, keys, pending, last_error FROM sb_stat_buffers WHERE buffer = 'buf' AND state NOT IN ('running', 'idle');

-- Other columns came and went.
BEGIN;
ALTER FOREIGN TABLE buf DROP COLUMN key, DROP COLUMN count,
  ADD COLUMN other bigint, ADD COLUMN count bigint;
SELECT sb_async_increment('5', 1, 'buf');
ROLLBACK;
-- In a subtransaction that is over, or was rolled back.
BEGIN;
SAVEPOINT sp;
ALTER FOREIGN TABLE buf ALTER key TYPE int;
ROLLBACK TO sp;
SELECT sb_async_increment('k', 1, 'buf');
SAVEPOINT sp;
ALTER FOREIGN TABLE buf ALTER key TYPE int;
RELEASE sp;
SELECT sb_async_increment(5, 1, 'buf');
ROLLBACK;
SELECT sb_drain('buf');
-- Committed, it is the buffer's for everybody.
BEGIN;
ALTER FOREIGN TABLE buf ALTER key TYPE int;
COMMIT;
SELECT sb_async_increment(5, 1, 'buf');
SELECT sb_drain('buf');
SELECT * FROM stored;

-- What was altered and is not the columns does not matter.
BEGIN;
ALTER FOREIGN TABLE buf OPTIONS (SET interval '2h');
INSERT INTO stored VALUES ('written', 0);
SELECT sb_async_increment(6, 1, 'buf');
ROLLBACK;
SELECT sb_drain('buf');
SELECT * FROM stored ORDER BY counter, key;

-- The fields of a row type, which are altered under the buffer.
CREATE TYPE inner_pair AS (a int, b int);
CREATE TYPE pair AS (x inner_pair[], y text);
CREATE FOREIGN TABLE pairs (key pair, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (interval '1h');
BEGIN;
INSERT INTO stored VALUES ('written', 0);
SELECT sb_async_increment('("{""(1,2)""}",y)', 1, 'pairs');
ALTER TYPE inner_pair ADD ATTRIBUTE c int;
SELECT sb_async_increment('("{""(1,2,3)""}",y)', 1, 'pairs');
ROLLBACK;
BEGIN;
ALTER TYPE pair DROP ATTRIBUTE y;
SELECT sb_async_increment('("{""(1,2)""}")', 1, 'pairs');
ROLLBACK;
SELECT key, count FROM pairs;

-- A buffer that is rolled back itself takes its counts along.
BEGIN;
CREATE TYPE brief_pair AS (a int, b int);
CREATE FOREIGN TABLE brief (key brief_pair, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (interval '1h');
SELECT sb_async_increment('(1,2)', 1, 'brief');
ALTER FOREIGN TABLE brief ALTER key TYPE text;
SELECT sb_async_increment('k', 1, 'brief');
-- But what is altered within may be rolled back alone.
SAVEPOINT sp;
ALTER FOREIGN TABLE brief ALTER key TYPE int;
SELECT sb_async_increment(5, 1, 'brief');
ROLLBACK TO sp;
SELECT sb_async_increment('k', 1, 'brief');
ROLLBACK;

-- An interval that is rolled back is not in force, also if it was what the
-- buffer had when something was first counted in it.
CREATE FUNCTION store_late(key text, counter bigint) RETURNS void LANGUAGE sql
AS $$ INSERT INTO stored VALUES (key, counter) $$;
CREATE FOREIGN TABLE late (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store_late', interval '100ms');
CREATE FOREIGN TABLE later (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store_late', interval '100ms');
BEGIN;
ALTER FOREIGN TABLE late OPTIONS (SET interval '1d');
SELECT sb_async_increment('whole transaction', 1, 'late');
ROLLBACK;
BEGIN;
SAVEPOINT sp;
ALTER FOREIGN TABLE later OPTIONS (SET interval '1d');
SELECT sb_async_increment('subtransaction', 1, 'later');
ROLLBACK TO sp;
COMMIT;
SELECT wait_until($$ (SELECT count(*) = 2 FROM stored WHERE key IN ('whole transaction', 'subtransaction')) $$);

DROP FOREIGN TABLE late, later;
DROP FUNCTION store_late(text, bigint);
DROP FOREIGN TABLE buf, pairs;
DROP TYPE pair, inner_pair;
DROP FUNCTION store(text, bigint), store(int, bigint);
DROP TABLE stored;
