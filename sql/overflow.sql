--
-- overflow: counts do not wrap, and large ones leave room for others
--
SET statement_timeout = '2min';

CREATE TABLE stored (key text PRIMARY KEY, total numeric NOT NULL, calls int NOT NULL);
CREATE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql AS $$
  INSERT INTO stored VALUES (key, counter, 1)
  ON CONFLICT (key) DO UPDATE SET total = stored.total + EXCLUDED.total, calls = stored.calls + 1
$$;
-- Its handler fails, so that what is counted stays; see the end.
CREATE FUNCTION fail(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN RAISE 'not now'; END $$;
CREATE FOREIGN TABLE buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'fail', interval '1h', timeout '1h', backoff '1h');
\set max 9223372036854775807
\set min '(-9223372036854775808)'
-- what increments beyond 2^40 can take a key to
\set limit 2305843009213693952
\set moderate 1099511627776

-- Keys that have failed, which are not flushed early.
SELECT sb_increment(k, 1, 'buf') FROM unnest('{up,down}'::text[]) k;
SET client_min_messages = error;
SELECT sb_drain('buf', '1s');
RESET client_min_messages;
SELECT sb_increment(k, -1, 'buf') FROM unnest('{up,down}'::text[]) k;

-- Up to the limit, and no further; nothing is changed by what fails.
SELECT sb_increment('up', :limit - 1, 'buf');
SELECT sb_increment('up', 1, 'buf');
SELECT sb_count('up', 'buf') = :limit AS full;
SELECT sb_increment('up', :moderate + 1, 'buf');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_async_increment('up', :moderate + 1, 'buf');
\echo :LAST_ERROR_SQLSTATE
INSERT INTO buf VALUES ('up', :moderate + 1);
SELECT sb_increment('up', :max, 'buf');
SELECT sb_async_increment('up', :max, 'buf');
SELECT sb_count('up', 'buf') = :limit AS full;
-- There is room for all that are not large, from everybody.
SELECT sb_increment('up', 1, 'buf');
SELECT sb_async_increment('up', :moderate, 'buf');
INSERT INTO buf VALUES ('up', :moderate);
SELECT sb_count('up', 'buf') - :limit = 2 * :moderate + 1 AS beyond;
-- Down from there it goes.
SELECT sb_increment('up', -2 * :moderate, 'buf');
SELECT sb_count('up', 'buf') = :limit + 1 AS one_beyond;
SELECT sb_increment('up', -:limit, 'buf');
SELECT sb_count('up', 'buf');
SELECT sb_increment('up', :limit - 1, 'buf');
SELECT sb_count('up', 'buf') = :limit AS full;

-- The other end.
SELECT sb_increment('down', -:limit + 1, 'buf');
SELECT sb_increment('down', -1, 'buf');
SELECT sb_increment('down', -:moderate - 1, 'buf');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_async_increment('down', -:moderate - 1, 'buf');
SELECT sb_increment('down', :min, 'buf');
SELECT sb_async_increment('down', :min, 'buf');
SELECT sb_count('down', 'buf') = -:limit AS full;
SELECT sb_increment('down', -:moderate, 'buf');
SELECT sb_increment('down', 2 * :moderate, 'buf');
SELECT sb_count('down', 'buf') + :limit = :moderate AS near;
SELECT sb_increment('down', -:moderate, 'buf');

-- In one step.
SELECT sb_async_increment('up at once', :limit, 'buf');
SELECT sb_async_increment('down at once', -:limit, 'buf');
SELECT sb_async_increment('up at once', :limit, 'buf');
SELECT sb_async_increment('too much', :limit + 1, 'buf');
SELECT sb_async_increment('too much', :min, 'buf');
SELECT coalesce(sb_count('too much', 'buf'), 0) AS too_much;

-- Within a transaction: what it adds itself must fit into a bigint,
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
-- and must be within the limit when it commits.
SELECT sb_increment('own', -:limit, 'buf');
SELECT sb_increment('own', -:limit, 'buf');
SELECT sb_increment('own', -:limit, 'buf');
COMMIT;
SELECT sb_count('own', 'buf') = :limit - 1 AS one_less;
BEGIN;
SELECT sb_increment('own down', :min, 'buf');
SELECT sb_increment('own down', -1, 'buf');
COMMIT;
SELECT sb_count('own down', 'buf');

-- What is there already counts when it commits.  All that the transaction did
-- is undone then, other keys too.
BEGIN;
SELECT sb_increment('other', 1, 'buf');
CREATE TABLE made_with_it (a int);
SELECT sb_increment('up', :moderate + 1, 'buf');
COMMIT;
\echo :LAST_ERROR_SQLSTATE
SELECT coalesce(sb_count('other', 'buf'), 0) AS other;
SELECT to_regclass('made_with_it');
SELECT sb_count('up', 'buf') = :limit AS full;
-- A transaction that goes over the end and comes back is fine.
BEGIN;
SELECT sb_increment('up', :limit, 'buf');
SELECT sb_increment('up', -:limit - 1, 'buf');
COMMIT;
SELECT sb_count('up', 'buf') = :limit - 1 AS one_less;
SELECT sb_increment('up', 1, 'buf');
-- What would be seen in between is an error if it is no bigint, not a number
-- that wrapped.
BEGIN;
SELECT sb_increment('up', :max, 'buf');
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
INSERT INTO buf SELECT 'many', :limit / 4 FROM generate_series(1, 4);
SELECT sb_count('many', 'buf') = :limit AS four;

-- The count itself is a bigint.  What PostgreSQL tells besides is another in 19.
\set VERBOSITY terse
SELECT sb_increment('k', 9223372036854775808, 'buf');
\set VERBOSITY default
INSERT INTO buf VALUES ('k', 9223372036854775808);

-- Whether a large count fits tells what the key has.  So who may not read that
-- gets the same answer whatever it has, and only of counts that are not large.
CREATE ROLE regress_counter;
GRANT INSERT ON buf TO regress_counter;
CREATE VIEW through AS SELECT * FROM buf;
GRANT INSERT ON through TO regress_counter;
SET ROLE regress_counter;
SELECT sb_increment('up', :moderate, 'buf');
SELECT sb_increment('up', -:moderate, 'buf');
SELECT sb_increment('up', :moderate + 1, 'buf');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_increment('empty', -:moderate - 1, 'buf');
SELECT sb_async_increment('up', :max, 'buf');
SELECT sb_async_increment('empty', :max, 'buf');
INSERT INTO buf VALUES ('empty', :max);
INSERT INTO buf SELECT 'empty', :moderate / 4 FROM generate_series(1, 5);
-- That the owner of a view may read it does not help who counts through it.
INSERT INTO through VALUES ('through', :moderate + 1);
BEGIN;
SELECT sb_increment('in all', :moderate, 'buf');
SELECT sb_increment('in all', 1, 'buf');
ROLLBACK;
RESET ROLE;
GRANT SELECT ON buf TO regress_counter;
SET ROLE regress_counter;
SELECT sb_increment('empty', :moderate + 1, 'buf');
SELECT sb_increment('up', :limit, 'buf');
RESET ROLE;
DROP VIEW through;
DROP OWNED BY regress_counter;
DROP ROLE regress_counter;

-- What was full is stored, and has room again.
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'store');
SELECT sb_start('buf');
SELECT sb_drain('buf');
SELECT key, total = :limit AS most, total = -:limit AS least, calls FROM stored ORDER BY key;
SELECT sb_increment('up', 1, 'buf');
SELECT sb_count('up', 'buf');
SELECT sb_increment('up', :limit - 1, 'buf');
SELECT sb_drain('buf');
SELECT key, total = :limit::numeric * 2 AS twice FROM stored WHERE key = 'up';

-- A key that has more is flushed early, so that there is room.
SELECT sb_increment('early', :limit, 'buf');
SELECT sb_increment('early', 1, 'buf');
DO $$
BEGIN
  FOR i IN 1 .. 1200 LOOP
    EXIT WHEN EXISTS (SELECT FROM stored WHERE key = 'early');
    COMMIT;
    PERFORM pg_sleep(0.1);
  END LOOP;
END
$$;
SELECT key, total - :limit AS more FROM stored WHERE key = 'early';

-- Keys that are merged before the handler is called, and do not fit in one
-- count together, go in several calls.
TRUNCATE stored;
CREATE FUNCTION store(key numeric, counter bigint) RETURNS void LANGUAGE sql
AS 'SELECT store(key::int::text, counter)';
CREATE FOREIGN TABLE by_numeric (key numeric NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
BEGIN;
SELECT sb_increment(k, :limit, 'by_numeric') FROM unnest('{1,1.0,1.00,1.000}'::numeric[]) k;
SELECT sb_increment(k, -:limit, 'by_numeric') FROM unnest('{2,2.0,2.00,2.000,2.0000}'::numeric[]) k;
SELECT sb_increment(3.0, :limit, 'by_numeric');
SELECT sb_increment(3.00, -:limit, 'by_numeric');
COMMIT;
SELECT sb_drain('by_numeric');
SELECT key, total = 4 * :limit::numeric AS up, total = -5 * :limit::numeric AS down, total, calls > 1 AS parts FROM stored ORDER BY key;
DROP FOREIGN TABLE by_numeric;
DROP FUNCTION store(numeric, bigint);

-- A new key is due when others are, however much is counted.
CREATE FOREIGN TABLE fresh (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h');
SELECT sb_async_increment('k', :limit, 'fresh') \;
SELECT oldest_due > now() + interval '50 min' AS later, pid
  FROM sb_stat_buffers WHERE buffer = 'fresh';
DROP FOREIGN TABLE fresh;

DROP FOREIGN TABLE buf;
DROP FUNCTION store(text, bigint);
DROP FUNCTION fail(text, bigint);
DROP TABLE stored;
