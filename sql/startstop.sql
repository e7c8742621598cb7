--
-- startstop: sb_stop() flushes and closes a buffer, sb_start() opens it
--
SET statement_timeout = '2min';

CREATE TABLE stored (key text PRIMARY KEY, total bigint NOT NULL);
CREATE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql AS $$
  INSERT INTO stored VALUES (key, counter)
  ON CONFLICT (key) DO UPDATE SET total = stored.total + EXCLUDED.total
$$;
CREATE FOREIGN TABLE buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer
  OPTIONS (handler 'store', interval '1h', timeout '1h', backoff '1h');

-- A buffer that was never used can be started and stopped.
SELECT sb_start('buf');
SELECT ftoptions FROM pg_foreign_table WHERE ftrelid = 'buf'::regclass;
SELECT sb_stop('buf');
SELECT sb_start('buf');

-- Stopping flushes what is counted.
SELECT sb_increment('k', 5, 'buf');
SELECT sb_stop('buf');
TABLE stored;
SELECT ftoptions FROM pg_foreign_table WHERE ftrelid = 'buf'::regclass;
SELECT state FROM sb_stat_buffers WHERE buffer = 'buf';

-- Increments are then an error that says what to do.
SELECT sb_increment('k', buffer => 'buf');
\echo :LAST_ERROR_SQLSTATE
SELECT sb_async_increment('k', buffer => 'buf');
INSERT INTO buf VALUES ('k', 1);
COPY buf FROM stdin;
k	1
\.
SELECT sb_flush('k', 'buf');
SELECT sb_flush_all('buf');
SELECT sb_drain('buf');
-- To look is not.
SELECT coalesce(sb_count('k', 'buf'), 0) AS count;
SELECT * FROM buf;
SELECT count(*) FROM sb_keys('buf') WHERE count <> 0;
SELECT sb_stat_reset('buf');

-- Stopped twice is stopped; no worker stays.
SELECT sb_stop('buf');
SELECT wait_until($$ (SELECT pid IS NULL FROM sb_stat_buffers
                      WHERE buffer = 'buf') $$);
SELECT state FROM sb_stat_buffers WHERE buffer = 'buf';

-- Started, it is as before.
SELECT sb_start('buf');
SELECT sb_start('buf');
SELECT ftoptions FROM pg_foreign_table WHERE ftrelid = 'buf'::regclass;
SELECT sb_increment('k', 6, 'buf');
SELECT sb_drain('buf');
TABLE stored;

-- A start brings the worker up without an increment.
CREATE FOREIGN TABLE fresh (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h');
SELECT state, pid FROM sb_stat_buffers WHERE buffer = 'fresh';
SELECT sb_start('fresh');
SELECT wait_until($$ (SELECT state = 'running' AND pid IN (SELECT pid FROM pg_stat_activity)
                      FROM sb_stat_buffers WHERE buffer = 'fresh') $$);
SELECT a.backend_type
  FROM sb_stat_buffers b JOIN pg_stat_activity a USING (pid)
  WHERE buffer = 'fresh';
SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'statbuffer launcher';
DROP FOREIGN TABLE fresh;

-- Both are part of the transaction.
BEGIN;
SELECT sb_stop('buf');
SELECT sb_increment('k', buffer => 'buf');
ROLLBACK;
SELECT sb_increment('k', 1, 'buf');
SELECT sb_stop('buf');
BEGIN;
SELECT sb_start('buf');
SELECT sb_increment('k', 100, 'buf');
ROLLBACK;
SELECT sb_increment('k', buffer => 'buf');
BEGIN;
SELECT sb_start('buf');
SELECT sb_increment('k', 1, 'buf');
COMMIT;
SELECT sb_count('k', 'buf');
-- A transaction that counted and then stops the buffer loses nothing: its own
-- count is held until the buffer is started again.
BEGIN;
SELECT sb_increment('k', 10, 'buf');
SELECT sb_stop('buf');
COMMIT;
SELECT sb_count('k', 'buf');
SELECT sb_start('buf');
SELECT sb_drain('buf');
TABLE stored;

-- An option "stopped" that was given is set and not added.
ALTER FOREIGN TABLE buf OPTIONS (ADD stopped 'off');
SELECT sb_stop('buf');
SELECT ftoptions FROM pg_foreign_table WHERE ftrelid = 'buf'::regclass;
SELECT sb_increment('k', buffer => 'buf');
SELECT sb_start('buf');
SELECT sb_increment('k', 1, 'buf');
SELECT sb_drain('buf');

-- A handler that fails keeps its counts: stopping tells so, when "shutdown"
-- is over.
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void
LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
  IF store.key LIKE 'bad%' THEN
    RAISE 'not now';
  END IF;
  INSERT INTO stored VALUES (store.key, counter)
  ON CONFLICT (key) DO UPDATE SET total = stored.total + EXCLUDED.total;
END $$;
ALTER FOREIGN TABLE buf OPTIONS (ADD shutdown '500ms');
INSERT INTO buf VALUES ('bad', 7), ('good', 8);
SELECT sb_stop('buf');
SELECT * FROM stored WHERE key IN ('bad', 'good');
SELECT * FROM buf;
SELECT last_error FROM sb_stat_buffers WHERE buffer = 'buf';
SELECT sb_count('bad', 'buf');
-- Once it does not fail any more, the start is enough.
CREATE OR REPLACE FUNCTION store(key text, counter bigint) RETURNS void LANGUAGE sql AS $$
  INSERT INTO stored VALUES (key, counter)
  ON CONFLICT (key) DO UPDATE SET total = stored.total + EXCLUDED.total
$$;
SELECT sb_start('buf');
SELECT sb_count('bad', 'buf');
SELECT sb_drain('buf');
SELECT * FROM stored WHERE key IN ('bad', 'good') ORDER BY key;

-- shutdown '0': stopped at once, without a flush.
ALTER FOREIGN TABLE buf OPTIONS (SET shutdown '0');
SELECT sb_increment('later', 9, 'buf');
SELECT sb_stop('buf');
SELECT * FROM buf;
SELECT * FROM stored WHERE key = 'later';
-- Stopped again, it still holds that.
SELECT sb_stop('buf');
-- What a stopped buffer holds can be discarded.
SELECT sb_start('buf');
SELECT sb_increment('later', 1, 'buf');
SELECT sb_count('later', 'buf');
SELECT sb_stop('buf');
TRUNCATE buf;
SELECT * FROM buf;
SELECT sb_stop('buf');
SELECT sb_start('buf');
SELECT * FROM buf;
ALTER FOREIGN TABLE buf OPTIONS (SET shutdown '500ms');

-- A start checks what a first use would not: that there is a handler.
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'no_such_function');
SELECT sb_start('buf');
\echo :LAST_ERROR_SQLSTATE
-- A stopped one stays stopped then.
SELECT sb_stop('buf');
SELECT sb_start('buf');
SELECT sb_increment('k', buffer => 'buf');
ALTER FOREIGN TABLE buf OPTIONS (SET handler 'store');
SELECT sb_start('buf');
SELECT sb_increment('k', 1, 'buf');

-- A stopped buffer is dropped as any.
SELECT sb_stop('buf');
-- Until the start is committed there is no worker, and nothing to wait for.
SELECT sb_start('buf');
SELECT sb_increment('late', 1, 'buf');
ALTER FOREIGN TABLE buf OPTIONS (SET shutdown '0');
SELECT sb_stop('buf');
BEGIN;
SELECT sb_start('buf');
SELECT sb_drain('buf');
ROLLBACK;
SELECT sb_start('buf');
SELECT sb_drain('buf');

DROP FOREIGN TABLE buf;
DROP FUNCTION store(text, bigint);
DROP TABLE stored;
