--
-- overflow: counts do not wrap
--
SET statement_timeout = '2min';

CREATE TABLE stored (key text PRIMARY KEY, total numeric NOT NULL, calls int NOT NULL);
CREATE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql AS $$
  INSERT INTO stored VALUES (key, counter, 1)
  ON CONFLICT (key) DO UPDATE SET total = stored.total + EXCLUDED.total, calls = stored.calls + 1
$$;
CREATE FOREIGN TABLE buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
\set max 9223372036854775807
\set min '(-9223372036854775808)'

-- Up to the end, and no further; nothing is changed by what fails.
SELECT sb_increment('up', :max - 1, 'buf');
SELECT sb_increment('up', 1, 'buf');
SELECT sb_count('up', 'buf') = :max AS full;
SELECT sb_increment('up', 1, 'buf');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_async_increment('up', 1, 'buf');
\echo :LAST_ERROR_SQLSTATE
INSERT INTO buf VALUES ('up', 1);
SELECT sb_increment('up', :max, 'buf');
SELECT sb_async_increment('up', :max, 'buf');
SELECT sb_count('up', 'buf') = :max AS full;
-- Down from there it goes.
SELECT sb_increment('up', -1, 'buf');
SELECT sb_async_increment('up', -1, 'buf');
SELECT sb_count('up', 'buf') = :max - 2 AS two_less;
SELECT sb_increment('up', 3, 'buf');
SELECT sb_increment('up', 2, 'buf');
SELECT sb_count('up', 'buf') = :max AS full;

-- The other end.
SELECT sb_increment('down', :min + 1, 'buf');
SELECT sb_increment('down', -1, 'buf');
SELECT sb_count('down', 'buf') = :min AS full;
SELECT sb_increment('down', -1, 'buf');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_async_increment('down', -1, 'buf');
SELECT sb_increment('down', :min, 'buf');
SELECT sb_async_increment('down', :min, 'buf');
SELECT sb_count('down', 'buf') = :min AS full;
SELECT sb_increment('down', :max, 'buf');
SELECT sb_count('down', 'buf');
SELECT sb_increment('down', :min + 1, 'buf');
SELECT sb_count('down', 'buf') = :min AS full;

-- In one step.
SELECT sb_async_increment('up at once', :max, 'buf');
SELECT sb_async_increment('down at once', :min, 'buf');
SELECT sb_async_increment('up at once', 1, 'buf');
SELECT sb_async_increment('down at once', -1, 'buf');

-- Within a transaction: what it adds itself must fit,
BEGIN;
SELECT sb_increment('own', :max, 'buf');
SELECT sb_increment('own', -5, 'buf');
SELECT sb_increment('own', 5, 'buf');
SAVEPOINT s;
SELECT sb_increment('own', 1, 'buf');
\echo :LAST_ERROR_SQLSTATE
ROLLBACK TO s;
INSERT INTO buf VALUES ('own', 1);
ROLLBACK TO s;
SELECT sb_count('own', 'buf') = :max AS full;
COMMIT;
SELECT sb_count('own', 'buf') = :max AS full;
BEGIN;
SELECT sb_increment('own down', :min, 'buf');
SELECT sb_increment('own down', -1, 'buf');
COMMIT;
SELECT sb_count('own down', 'buf');

-- and together with what is there already, at the latest when it commits.
-- All that the transaction did is undone then, other keys too.
BEGIN;
SELECT sb_increment('other', 1, 'buf');
CREATE TABLE made_with_it (a int);
SELECT sb_increment('up', 1, 'buf');
COMMIT;
\echo :LAST_ERROR_SQLSTATE
SELECT coalesce(sb_count('other', 'buf'), 0) AS other;
SELECT to_regclass('made_with_it');
SELECT sb_count('up', 'buf') = :max AS full;
-- A transaction that goes over the end and comes back is fine.
BEGIN;
SELECT sb_increment('up', 1, 'buf');
SELECT sb_increment('up', -2, 'buf');
COMMIT;
SELECT sb_count('up', 'buf') = :max - 1 AS one_less;
SELECT sb_increment('up', 1, 'buf');
-- What would be seen in between is an error too, not a number that wrapped.
BEGIN;
SELECT sb_increment('up', 1, 'buf');
SAVEPOINT s;
SELECT sb_count('up', 'buf');
\echo :LAST_ERROR_SQLSTATE
ROLLBACK TO s;
SELECT count FROM buf WHERE key = 'up';
\echo :LAST_ERROR_SQLSTATE
ROLLBACK;

-- A statement of many increments, of which one is too many.
SELECT sb_increment('many', :max / 3, 'buf') FROM generate_series(1, 4);
SELECT sb_count('many', 'buf');
INSERT INTO buf SELECT 'many', :max / 3 FROM generate_series(1, 4);
SELECT sb_count('many', 'buf');
INSERT INTO buf SELECT 'many', :max / 3 FROM generate_series(1, 3);
SELECT sb_count('many', 'buf') = :max / 3 * 3 AS three;

-- The count itself is a bigint.  What PostgreSQL tells besides is another in 19.
\set VERBOSITY terse
SELECT sb_increment('k', 9223372036854775808, 'buf');
\set VERBOSITY default
INSERT INTO buf VALUES ('k', 9223372036854775808);

-- What was full is stored, and has room again.
SELECT key, count = :max AS max, count = :min AS min FROM buf
  WHERE count NOT BETWEEN :min + 1 AND :max - 1 ORDER BY key;
SELECT sb_drain('buf');
SELECT key, total = :max AS max, total = :min AS min, calls FROM stored ORDER BY key;
SELECT sb_increment('up', 1, 'buf');
SELECT sb_count('up', 'buf');
SELECT sb_increment('up', :max - 1, 'buf');
SELECT sb_count('up', 'buf') = :max AS full;
SELECT sb_drain('buf');
SELECT key, total = :max::numeric * 2 AS twice FROM stored WHERE key = 'up';

-- Keys that are merged before the handler is called, and don't fit in one
-- count together, go in two calls.
TRUNCATE stored;
CREATE FUNCTION store(key numeric, counter bigint) RETURNS void LANGUAGE sql
AS 'SELECT store(key::int::text, counter)';
CREATE FOREIGN TABLE by_numeric (key numeric NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
SELECT sb_increment(1.0, :max, 'by_numeric');
SELECT sb_increment(1.00, :max, 'by_numeric');
SELECT sb_increment(2.0, :min, 'by_numeric');
SELECT sb_increment(2.00, -1, 'by_numeric');
SELECT sb_increment(3.0, :max, 'by_numeric');
SELECT sb_increment(3.00, :min, 'by_numeric');
SELECT sb_drain('by_numeric');
SELECT key, total, calls FROM stored ORDER BY key;
DROP FOREIGN TABLE by_numeric;
DROP FUNCTION store(numeric, bigint);

-- A new key is due when others are, however much is counted.
CREATE FOREIGN TABLE fresh (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h');
SELECT sb_async_increment('k', :max, 'fresh') \;
SELECT oldest_due > now() + interval '50 min' AS later, pid
  FROM sb_stat_buffers WHERE buffer = 'fresh'::regclass;
DROP FOREIGN TABLE fresh;

DROP FOREIGN TABLE buf;
DROP FUNCTION store(text, bigint);
DROP TABLE stored;
