--
-- handler: how counts get to it, and what becomes of those that do not
--

-- A drain that would never end ends the test.
SET statement_timeout = '2min';

CREATE TABLE calls (n serial, keys text, counts text, as_whom name DEFAULT current_user);
CREATE FOREIGN TABLE buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h', backoff '1h');
CREATE FUNCTION has_failed(key text) RETURNS boolean LANGUAGE sql
AS $$ SELECT wait_until(format('EXISTS (SELECT FROM sb_keys(''buf'') WHERE key = %L AND failures > 0 AND last_error IS NOT NULL)', key)) $$;
CREATE FUNCTION status() RETURNS TABLE (state text, failures bigint, last_error text)
LANGUAGE sql AS $$
  SELECT state, failures, last_error FROM sb_stat_buffers WHERE buffer = 'buf'
$$;

--
-- One key a call
--
CREATE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql
AS 'INSERT INTO calls (keys, counts) VALUES (key, counter)';
INSERT INTO buf VALUES ('b', 2), ('a', 1), ('c', 3), ('b', 20);
SELECT sb_drain('buf');
-- in the order of the keys, each once
SELECT keys, counts, as_whom = current_user AS as_owner FROM calls ORDER BY n;
TRUNCATE calls;
-- Nothing to be flushed: no call.
SELECT sb_drain('buf');
SELECT count(*) FROM calls;

--
-- Many keys a call: preferred when both forms exist
--
CREATE FUNCTION store(keys text[], counters bigint[]) RETURNS void LANGUAGE sql
AS 'INSERT INTO calls (keys, counts) VALUES (keys, counters)';
INSERT INTO buf VALUES ('b', 2), ('a', 1), ('c', 3), ('b', 20), ('d', -4);
SELECT sb_drain('buf');
SELECT keys, counts FROM calls ORDER BY n; TRUNCATE calls;
-- One key is an array, too.
INSERT INTO buf VALUES ('one', 1);
SELECT sb_drain('buf');
SELECT keys, counts FROM calls ORDER BY n; TRUNCATE calls;
-- Up to batch_size in one.
ALTER FOREIGN TABLE buf OPTIONS (ADD batch_size '2');
INSERT INTO buf VALUES ('a', 1), ('b', 1), ('c', 1), ('d', 1), ('e', 1);
SELECT sb_drain('buf');
SELECT max(cardinality(keys::text[])) AS most, sum(cardinality(keys::text[])) AS all_of_them
  FROM calls;
SELECT key, sum(1) FROM calls, unnest(keys::text[]) AS key GROUP BY key ORDER BY key;
TRUNCATE calls;
ALTER FOREIGN TABLE buf OPTIONS (SET batch_size '1');
INSERT INTO buf VALUES ('a', 1), ('b', 1), ('c', 1);
SELECT sb_drain('buf');
SELECT keys, counts FROM calls ORDER BY keys; TRUNCATE calls;
ALTER FOREIGN TABLE buf OPTIONS (DROP batch_size);

-- Many keys, too: sorted, whether or not their beginnings differ, and merged
-- where their types call them equal.
CREATE TABLE got (n bigint, t text COLLATE "C", x numeric, count bigint);
CREATE FOREIGN TABLE many (t text COLLATE "C", x numeric, count bigint NOT NULL)
  SERVER statbuffer OPTIONS (handler 'store_many', interval '1h', timeout '1h');
CREATE FUNCTION store_many(ts text[], xs numeric[], counts bigint[]) RETURNS void LANGUAGE sql
AS 'INSERT INTO got SELECT n, t, x, c FROM unnest(ts, xs, counts) WITH ORDINALITY AS k (t, x, c, n)';
CREATE VIEW seen AS
  SELECT count(*) AS keys, sum(count) AS counted,
         count(*) = count(DISTINCT (t, x)) AS merged,
         array_agg(n ORDER BY n) = array_agg(n ORDER BY t, x) AS sorted
    FROM got;
INSERT INTO many SELECT md5(i::text), i % 5, 1 FROM generate_series(1, 500) i;
SELECT sb_drain('many');
SELECT * FROM seen; TRUNCATE got;
INSERT INTO many SELECT 'all begin alike: ' || i % 150, round(i % 3, i % 4), 1 FROM generate_series(1, 900) i;
INSERT INTO many SELECT NULL, round(i % 7, i % 3), 1 FROM generate_series(1, 50) i;
INSERT INTO many SELECT 'all', NULL, 1 FROM generate_series(1, 50) i;
SELECT sb_drain('many');
SELECT * FROM seen; TRUNCATE got;
-- The first column is one without an order, by its bytes; or one that needs no
-- abbreviation.
CREATE TABLE got_others (what text, x text, count bigint);
CREATE FOREIGN TABLE by_place (place point, x numeric, count bigint NOT NULL)
  SERVER statbuffer OPTIONS (handler 'store_places', interval '1h', timeout '1h');
CREATE FUNCTION store_places(places point[], xs numeric[], counts bigint[]) RETURNS void LANGUAGE sql
AS $$ INSERT INTO got_others SELECT 'place', unnest(places)::text || unnest(xs), unnest(counts) $$;
CREATE FOREIGN TABLE by_number (n bigint, count bigint NOT NULL)
  SERVER statbuffer OPTIONS (handler 'store_numbers', interval '1h', timeout '1h');
CREATE FUNCTION store_numbers(ns bigint[], counts bigint[]) RETURNS void LANGUAGE sql
AS $$ INSERT INTO got_others SELECT 'number', unnest(ns), unnest(counts) $$;
INSERT INTO by_place SELECT point(i % 20, -i % 20), round(i % 3, i % 4), 1 FROM generate_series(1, 240) i;
INSERT INTO by_number SELECT nullif((i * 7919) % 101 - 50, 3), 1 FROM generate_series(1, 202) i;
SELECT sb_drain('by_place'), sb_drain('by_number');
SELECT what, count(*) AS keys, sum(count) AS counted FROM got_others GROUP BY what ORDER BY what;
SELECT array_agg(x::bigint) = array_agg(x::bigint ORDER BY x::bigint) AS sorted FROM got_others WHERE what = 'number';
DROP FOREIGN TABLE many, by_place, by_number;
-- It goes on with the other form when this one is dropped.
DROP FUNCTION store(text[], bigint[]);
INSERT INTO buf VALUES ('a', 1), ('b', 2);
SELECT sb_drain('buf');
SELECT keys, counts FROM calls ORDER BY n; TRUNCATE calls;

-- Several key columns: an array of each, with nulls in it.
CREATE FOREIGN TABLE buf2 (a int NOT NULL, b text, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store2', interval '1h');
CREATE FUNCTION store2(a int[], b text[], counters bigint[]) RETURNS void LANGUAGE sql
AS 'INSERT INTO calls (keys, counts) VALUES (concat(a, b), counters)';
INSERT INTO buf2 VALUES (2, 'x', 1), (1, NULL, 2), (1, 'y', 3), (1, '', 4);
SELECT sb_drain('buf2');
SELECT keys, counts FROM calls ORDER BY n; TRUNCATE calls;
DROP FUNCTION store2;
CREATE FUNCTION store2(a int, b text, counter bigint) RETURNS void LANGUAGE sql
AS 'INSERT INTO calls (keys, counts) VALUES (concat(a, b), counter)';
INSERT INTO buf2 VALUES (2, 'x', 1), (1, NULL, 2);
SELECT sb_drain('buf2');
SELECT keys, counts FROM calls ORDER BY n; TRUNCATE calls;
DROP FOREIGN TABLE buf2;
DROP FUNCTION store2;

--
-- A count of 0 is never handed over
--
INSERT INTO buf VALUES ('up and down', 5);
INSERT INTO buf VALUES ('up and down', -5), ('up', 1);
SELECT sb_drain('buf');
SELECT keys, counts FROM calls ORDER BY n; TRUNCATE calls;
SELECT sb_count('up and down', 'buf');

--
-- What one call does, the next one sees; all of a batch is one transaction
--
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql
AS 'INSERT INTO calls (keys, counts) SELECT txid_current(), count(*) FROM calls';
INSERT INTO buf VALUES ('a', 1), ('b', 1), ('c', 1);
SELECT sb_drain('buf');
SELECT counts, keys = lag(keys) OVER (ORDER BY n) AS same_transaction FROM calls ORDER BY n;
TRUNCATE calls;
ALTER FOREIGN TABLE buf OPTIONS (ADD batch_size '1');
INSERT INTO buf VALUES ('a', 1), ('b', 1), ('c', 1);
SELECT sb_drain('buf');
SELECT counts, keys = lag(keys) OVER (ORDER BY n) AS same_transaction FROM calls ORDER BY n;
TRUNCATE calls;
ALTER FOREIGN TABLE buf OPTIONS (DROP batch_size);

--
-- boolean: true is success, false and null are failure
--
DROP FUNCTION store(text, bigint);
CREATE FUNCTION store(key text, counter bigint) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO calls (keys, counts) VALUES (key, counter);
  RETURN CASE key WHEN 'false' THEN false WHEN 'true' THEN true END;
END $$;
INSERT INTO buf VALUES ('true', 1);
SELECT sb_drain('buf');
INSERT INTO buf VALUES ('false', 2);
SET client_min_messages = error;
SELECT sb_drain('buf', '100 ms');
RESET client_min_messages;
SELECT has_failed('false');
SELECT state, failures > 0 AS failed, last_error FROM status();
INSERT INTO buf VALUES ('null', 3);
SET client_min_messages = error;
SELECT sb_drain('buf', '100 ms');
RESET client_min_messages;
SELECT has_failed('null');
-- What the failed calls did is undone; the counts are kept, and the failures.
SELECT keys, counts FROM calls ORDER BY n; TRUNCATE calls;
SELECT * FROM buf ORDER BY key;
SELECT key, count, in_flight, failures > 0 AS failed, last_error
  FROM sb_keys('buf') WHERE count > 0 ORDER BY key;
-- They do not hold up others.
INSERT INTO buf VALUES ('true', 5), ('null', 30);
SET client_min_messages = error;
SELECT sb_drain('buf', '100 ms');
RESET client_min_messages;
SELECT wait_until($$ sb_count('true', 'buf') = 0 $$);
SELECT keys, counts FROM calls ORDER BY n; TRUNCATE calls;
SELECT * FROM buf ORDER BY key;
-- With a handler that does, all is stored, and nothing fails any more.
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS boolean LANGUAGE sql
AS 'INSERT INTO calls (keys, counts) VALUES (key, counter) RETURNING true';
SELECT sb_drain('buf');
SELECT keys, counts FROM calls ORDER BY keys; TRUNCATE calls;
SELECT state FROM status();
SELECT count(*) FROM sb_keys('buf') WHERE failures > 0 OR last_error IS NOT NULL;

-- the array form: false fails for all of the batch, down to the key to blame
CREATE FUNCTION store(keys text[], counters bigint[]) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO calls (keys, counts) SELECT * FROM unnest(keys, counters);
  RETURN NOT 'bad' = ANY (keys);
END $$;
INSERT INTO buf SELECT 'good' || i, i FROM generate_series(1, 50) AS i;
INSERT INTO buf VALUES ('bad', 7);
SELECT sb_flush_all('buf');
SELECT has_failed('bad');
SELECT wait_until($$ (SELECT count(*) FROM buf) = 1 $$);
SELECT count(*), sum(counts::bigint) FROM calls;
SELECT * FROM buf;
SELECT key, count, failures > 0 AS failed, last_error FROM sb_keys('buf') WHERE count <> 0;
TRUNCATE calls, buf;
DROP FUNCTION store(text[], bigint[]), store(text, bigint);

--
-- An error of the handler is a failure of its key
--
CREATE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF key LIKE 'bad%' THEN
    RAISE EXCEPTION 'no % today', key USING DETAIL = 'Some detail.', HINT = 'Come back later.';
  END IF;
  INSERT INTO calls (keys, counts) VALUES (key, counter);
END $$;
INSERT INTO buf SELECT 'good' || i, i FROM generate_series(1, 50) AS i;
INSERT INTO buf VALUES ('bad1', 7), ('bad2', 8);
SELECT sb_flush_all('buf');
SELECT has_failed('bad1'), has_failed('bad2');
SELECT wait_until($$ (SELECT count(*) FROM buf) = 2 $$);
SELECT count(*), sum(counts::bigint) FROM calls;
SELECT key, count, failures > 0 AS failed, last_error FROM sb_keys('buf')
  WHERE count <> 0 ORDER BY key;
-- A flush that is asked for is one more attempt.
SELECT failures AS before FROM sb_keys('buf') WHERE key = 'bad1' \gset
SELECT sb_flush('bad1', 'buf');
SELECT wait_until(format($$ (SELECT failures > %s FROM sb_keys('buf') WHERE key = 'bad1') $$, :before));
-- Without one, the next comes after "backoff".
SELECT due_at > now() + interval '50 min' AS backs_off FROM sb_keys('buf')
  WHERE key LIKE 'bad_';
ALTER FOREIGN TABLE buf OPTIONS (SET backoff '10ms');
SELECT sb_flush_all('buf');
SELECT wait_until($$ (SELECT min(failures) > 5 FROM sb_keys('buf') WHERE key LIKE 'bad_') $$);
ALTER FOREIGN TABLE buf OPTIONS (SET backoff '1h');
-- More can be counted meanwhile, and arrives together with what had failed.
INSERT INTO buf VALUES ('bad1', 70);
SELECT sb_count('bad1', 'buf');
TRUNCATE calls;
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql
AS 'INSERT INTO calls (keys, counts) VALUES (key, counter)';
SELECT sb_drain('buf');
SELECT keys, counts FROM calls ORDER BY keys; TRUNCATE calls;

-- A constraint that is checked at the end of the transaction fails, too.
CREATE TABLE allowed (key text PRIMARY KEY);
INSERT INTO allowed VALUES ('ok');
CREATE TABLE checked (key text REFERENCES allowed DEFERRABLE INITIALLY DEFERRED);
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql
AS 'INSERT INTO checked VALUES (key)';
INSERT INTO buf VALUES ('ok'), ('not ok'), ('ok too');
INSERT INTO allowed VALUES ('ok too');
SELECT sb_flush_all('buf');
SELECT has_failed('not ok');
SELECT wait_until($$ (SELECT count(*) FROM buf) = 1 $$);
SELECT * FROM checked ORDER BY key;
SELECT key, count, last_error FROM sb_keys('buf') WHERE count <> 0;
TRUNCATE buf;
DROP TABLE checked, allowed;

-- One that takes too long is cut off.
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql
AS 'SELECT pg_sleep(600)';
ALTER FOREIGN TABLE buf OPTIONS (ADD handler_timeout '50ms');
INSERT INTO buf VALUES ('slow', 7);
SELECT sb_flush('slow', 'buf');
SELECT has_failed('slow');
SELECT key, count, in_flight, last_error FROM sb_keys('buf') WHERE count <> 0;
ALTER FOREIGN TABLE buf OPTIONS (DROP handler_timeout);
TRUNCATE buf;

-- A handler may not end transactions of its own accord.
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE plpgsql
AS 'BEGIN COMMIT; END';
INSERT INTO buf VALUES ('commit', 7);
SELECT sb_flush_all('buf');
SELECT has_failed('commit');
SELECT key, count, last_error FROM sb_keys('buf') WHERE count <> 0;
TRUNCATE buf;
DROP FUNCTION store(text, bigint);

--
-- restart 'temporary': one attempt, then the count is discarded
--
ALTER FOREIGN TABLE buf OPTIONS (ADD restart 'temporary');
SELECT sb_stat_reset('buf');
CREATE FUNCTION store(key text, counter bigint) RETURNS boolean LANGUAGE sql
AS $$ INSERT INTO calls (keys, counts) VALUES (key, counter); SELECT key <> 'bad' $$;
INSERT INTO buf VALUES ('bad', 100), ('good', 5);
SET client_min_messages = error; -- the drain may come too late to warn of it
SELECT sb_drain('buf');
RESET client_min_messages;
SELECT * FROM buf;
SELECT keys, counts FROM calls ORDER BY n; TRUNCATE calls;
SELECT wait_until($$ (SELECT flushed_count = 5 FROM sb_stat_buffers
                      WHERE buffer = 'buf') $$);
SELECT flushed_count, failures, discarded, pending, state FROM sb_stat_buffers
  WHERE buffer = 'buf';
-- It can be counted anew.
INSERT INTO buf VALUES ('bad', 1);
SELECT sb_count('bad', 'buf');
ALTER FOREIGN TABLE buf OPTIONS (DROP restart);
TRUNCATE buf;
DROP FUNCTION store(text, bigint);

--
-- No handler, or none that could be one: the counts wait for it
--
INSERT INTO buf VALUES ('k', 7);
CREATE FUNCTION status_after_flush() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
  PERFORM sb_stat_reset('buf');
  PERFORM sb_flush_all('buf');
  PERFORM wait_until('(SELECT last_error IS NOT NULL FROM status())');
  RETURN (SELECT concat_ws(' | ', state, last_error) FROM status());
END $$;
SELECT sb_start('buf');
\echo :LAST_ERROR_SQLSTATE
SELECT status_after_flush();
-- other arguments
CREATE FUNCTION store(key int, counter bigint) RETURNS void LANGUAGE sql AS '';
SELECT sb_start('buf');
SELECT status_after_flush();
DROP FUNCTION store;
CREATE FUNCTION store(key text) RETURNS void LANGUAGE sql AS '';
SELECT sb_start('buf');
DROP FUNCTION store;
CREATE FUNCTION store(keys text[], counter bigint) RETURNS void LANGUAGE sql AS '';
SELECT sb_start('buf');
DROP FUNCTION store;
-- another result
CREATE FUNCTION store(key text, counter bigint) RETURNS int LANGUAGE sql AS 'SELECT 1';
SELECT sb_start('buf');
\echo :LAST_ERROR_SQLSTATE
SELECT status_after_flush();
DROP FUNCTION store;
CREATE FUNCTION store(key text, counter bigint) RETURNS SETOF boolean LANGUAGE sql AS 'SELECT true';
SELECT sb_start('buf');
SELECT status_after_flush();
DROP FUNCTION store;
CREATE FUNCTION store(key text, counter bigint, OUT a boolean, OUT b boolean) LANGUAGE sql
AS 'SELECT true, true';
SELECT sb_start('buf');
DROP FUNCTION store;
CREATE FUNCTION store(key text, counter bigint) RETURNS TABLE (ok boolean) LANGUAGE sql AS 'SELECT true';
SELECT sb_start('buf');
DROP FUNCTION store;
-- no function
CREATE PROCEDURE store(key text, counter bigint) LANGUAGE sql AS '';
SELECT sb_start('buf');
\echo :LAST_ERROR_SQLSTATE
SELECT status_after_flush();
DROP PROCEDURE store;
CREATE FUNCTION agg_step(state int, key text, counter bigint) RETURNS int LANGUAGE sql AS 'SELECT 1';
CREATE AGGREGATE store(text, bigint) (sfunc = agg_step, stype = int);
SELECT sb_start('buf');
DROP AGGREGATE store(text, bigint);
DROP FUNCTION agg_step;
-- in a schema where nobody looks, and when it is named
CREATE SCHEMA elsewhere;
CREATE FUNCTION elsewhere.store(key text, counter bigint) RETURNS void LANGUAGE sql
AS 'INSERT INTO public.calls (keys, counts) VALUES (key, counter)';
SELECT sb_start('buf');
SELECT status_after_flush();
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'elsewhere.no_such_function');
SELECT sb_start('buf');
SELECT status_after_flush();
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'nowhere.store');
SELECT sb_start('buf');
SELECT status_after_flush();
-- After all this the count is still there.
SELECT sb_count('k', 'buf');
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'elsewhere.store');
SELECT sb_start('buf');
SELECT sb_drain('buf');
SELECT wait_until($$ (SELECT state <> 'failing' FROM status()) $$);
SELECT keys, counts FROM calls ORDER BY n; TRUNCATE calls;
DROP SCHEMA elsewhere CASCADE;
-- dropped, and back again
SELECT sb_stat_reset('buf');
INSERT INTO buf VALUES ('k', 8);
SET client_min_messages = error;
SELECT sb_drain('buf', '100 ms');
RESET client_min_messages;
SELECT wait_until('(SELECT last_error IS NOT NULL FROM status())');
SELECT state, last_error FROM status();
CREATE SCHEMA elsewhere;
CREATE FUNCTION elsewhere.store(key text, counter bigint) RETURNS void LANGUAGE sql
AS 'INSERT INTO public.calls (keys, counts) VALUES (key, counter)';
SELECT sb_drain('buf');
SELECT keys, counts FROM calls ORDER BY n; TRUNCATE calls;
SELECT wait_until($$ (SELECT state <> 'failing' FROM status()) $$);
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'store');
DROP SCHEMA elsewhere CASCADE;
DROP FUNCTION status_after_flush;

-- Procedural languages, polymorphic and variadic arguments.
CREATE FUNCTION store(key anyelement, counter bigint) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO calls (keys, counts) VALUES (key || ' of ' || pg_typeof(key), counter);
  RETURN true;
END $$;
INSERT INTO buf VALUES ('k', 9);
SELECT sb_drain('buf');
SELECT keys, counts FROM calls ORDER BY n; TRUNCATE calls;
DROP FUNCTION store(anyelement, bigint);

--
-- sb_flush: this key now, without waiting; sb_flush_all: all
--
CREATE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql
AS 'INSERT INTO calls (keys, counts) VALUES (key, counter)';
INSERT INTO buf VALUES ('a', 1), ('b', 2), ('c', 3);
SELECT sb_flush('b', 'buf');
SELECT wait_until('EXISTS (SELECT FROM calls)');
SELECT wait_until($$ sb_count('b', 'buf') = 0 $$);
SELECT keys, counts FROM calls;
SELECT * FROM buf ORDER BY key;
-- One that is not held is no error, and no call.
SELECT sb_flush('no such key', 'buf');
SELECT sb_flush('b', 'buf');
SELECT sb_flush_all('buf');
SELECT wait_until('NOT EXISTS (SELECT FROM buf)');
SELECT keys, counts FROM calls ORDER BY keys; TRUNCATE calls;
SELECT sb_flush_all('buf');
-- What the transaction has not committed is not flushed before it is, and at
-- once when it is.
BEGIN;
INSERT INTO buf VALUES ('mine', 1);
SELECT sb_flush('mine', 'buf');
SELECT sb_flush_all('buf');
SELECT sb_drain('buf');
SELECT sb_count('mine', 'buf');
SELECT count(*) FROM calls;
COMMIT;
SELECT wait_until($$ EXISTS (SELECT FROM calls) $$);
SELECT keys, counts FROM calls; TRUNCATE calls;

--
-- sb_drain: true when all is stored, false when the time is up
--
SELECT sb_drain('buf', NULL);
SELECT sb_drain('buf', timeout => '1 min');
SELECT sb_drain(buffer => 'buf', timeout => interval '1 day');
SELECT sb_drain('buf', '1000 years');
SELECT sb_drain('buf', '-1 s');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_drain('buf', '-1 month');
SELECT sb_drain('buf', 'soon');
-- A buffer that was never counted in has nothing to be flushed, and needs no handler.
CREATE FOREIGN TABLE unused (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'no_such_function');
SELECT sb_drain('unused');
SELECT sb_flush('k', 'unused');
SELECT sb_flush_all('unused');
DROP FOREIGN TABLE unused;
-- While a handler waits, the time is up.  Once it does not, it is not.
CREATE TABLE gate (open boolean);
INSERT INTO gate VALUES (false);
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF NOT (SELECT open FROM gate) THEN
    RAISE 'the gate is shut';
  END IF;
  INSERT INTO calls (keys, counts) VALUES (key, counter);
END $$;
INSERT INTO buf VALUES ('k', 11);
SET client_min_messages = error;
SELECT sb_drain('buf', '0');
RESET client_min_messages;
SET client_min_messages = error;
SELECT sb_drain('buf', '50 ms');
RESET client_min_messages;
SELECT sb_count('k', 'buf');
SET statement_timeout = '100ms';
\set VERBOSITY terse
SET client_min_messages = error;
SELECT sb_drain('buf');
RESET client_min_messages;
\set VERBOSITY default
SET statement_timeout = '2min';
UPDATE gate SET open = true;
SELECT sb_drain('buf');
SELECT keys, counts FROM calls; TRUNCATE calls;
SELECT sb_count('k', 'buf');
-- In a transaction that keeps the worker out it would wait for itself.
INSERT INTO buf VALUES ('k', 12);
BEGIN;
ALTER FOREIGN TABLE buf OPTIONS (SET interval '2h');
SELECT sb_drain('buf');
\echo :LAST_ERROR_SQLSTATE
ROLLBACK;
BEGIN;
TRUNCATE buf;
SELECT sb_drain('buf');
ROLLBACK;
SELECT sb_count('k', 'buf');
-- With a lesser lock it need not.
BEGIN;
COMMENT ON FOREIGN TABLE buf IS 'for the tests';
SELECT sb_drain('buf');
SELECT sb_count('k', 'buf');
ROLLBACK;
SELECT keys, counts FROM calls; TRUNCATE calls;

--
-- interval '0': as soon as possible; a short one without being asked
--
ALTER FOREIGN TABLE buf OPTIONS (SET interval '0');
INSERT INTO buf VALUES ('now', 1);
SELECT wait_until('EXISTS (SELECT FROM calls)');
ALTER FOREIGN TABLE buf OPTIONS (SET interval '20ms');
INSERT INTO buf VALUES ('soon', 2);
SELECT wait_until('(SELECT count(*) FROM calls) = 2');
SELECT keys, counts FROM calls ORDER BY n; TRUNCATE calls;

--
-- A handler may count, in another buffer and in its own
--
CREATE FOREIGN TABLE totals (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store_total', interval '1h', timeout '1h');
CREATE FUNCTION store_total(key text, counter bigint) RETURNS void LANGUAGE sql
AS 'INSERT INTO calls (keys, counts) VALUES (key, counter)';
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql AS $$
  SELECT sb_increment('total', counter, 'totals');
  SELECT sb_increment('again', counter, 'buf') WHERE key = 'first'
$$;
ALTER FOREIGN TABLE buf OPTIONS (SET interval '1h');
INSERT INTO buf VALUES ('first', 3), ('second', 4);
SELECT sb_drain('buf');
SELECT * FROM buf;
SELECT * FROM totals;
SELECT sb_drain('buf'), sb_drain('totals');
SELECT keys, counts FROM calls ORDER BY n; TRUNCATE calls;
DROP FOREIGN TABLE totals;
DROP FUNCTION store_total(text, bigint);

DROP FOREIGN TABLE buf;
DROP FUNCTION store(text, bigint);
DROP FUNCTION has_failed, status;
DROP TABLE calls, gate;
