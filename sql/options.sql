--
-- options: what each takes, what it refuses, and where there are none
--

CREATE FUNCTION handle_flush(key text, counter bigint) RETURNS void
LANGUAGE sql AS '';

-- All of them at once, and read back as they were written.
CREATE FOREIGN TABLE buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer
  OPTIONS (handler 'public.handle_flush', interval '5s', jitter '1s',
           timeout '10s', backoff '1s', restart 'transient', shutdown '5s',
           batch_size '1000', batch_time '1s', handler_timeout '0',
           max_memory '64MB', when_full 'error', stopped 'false');
SELECT option_name, option_value
  FROM pg_options_to_table((SELECT ftoptions FROM pg_foreign_table
                            WHERE ftrelid = 'buf'::regclass));
SELECT sb_increment('k', buffer => 'buf');
DROP FOREIGN TABLE buf;

-- None at all: all have defaults.
CREATE FOREIGN TABLE buf (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
  SERVER statbuffer;
SELECT sb_increment('k', buffer => 'buf');
SELECT sb_drain('buf');

-- Two helpers: what is said of a value, and whether it is taken.
CREATE FUNCTION try_option(name text, value text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
  state text;
  message text;
  hint text;
BEGIN
  BEGIN
    EXECUTE format('ALTER FOREIGN TABLE buf OPTIONS (ADD %I %L)', name, value);
  EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE,
      message = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
    RETURN concat_ws(E'\n', state || ': ' || message, nullif(hint, ''));
  END;
  EXECUTE format('ALTER FOREIGN TABLE buf OPTIONS (DROP %I)', name);
  RETURN 'ok';
END $$;

-- Times are written as settings write them, or as intervals; a bare number is
-- milliseconds.
SELECT name, value, try_option(name, value)
  FROM unnest(ARRAY['interval', 'jitter', 'timeout', 'backoff', 'shutdown',
                    'batch_time', 'handler_timeout']) WITH ORDINALITY AS n (name, i),
       unnest(ARRAY['1', '250', '500ms', '5s', '5 s', '1min', '1h', '1.5s',
                    '5 seconds', '1 minute', '00:00:05', 'PT5S', '1 day', '5S'])
         WITH ORDINALITY AS v (value, j)
  WHERE try_option(name, value) <> 'ok'
  ORDER BY i, j;

-- Where 0 has a meaning, and where it has none.
SELECT name, try_option(name, '0')
  FROM unnest(ARRAY['interval', 'jitter', 'timeout', 'backoff', 'shutdown',
                    'batch_time', 'handler_timeout']) AS name;

-- The longest.
SELECT name, try_option(name, '1d'), try_option(name, '2147483647'),
       try_option(name, '2147483648')
  FROM unnest(ARRAY['interval', 'jitter', 'timeout', 'backoff', 'shutdown',
                    'batch_time', 'handler_timeout']) AS name;

-- Not a time, or not one that can be.
\x on
SELECT value, try_option('interval', value)
  FROM unnest(ARRAY['', ' ', 'soon', '5 apples', '-1', '-5s', '1e99',
                    '-5 seconds', '1 hour -5 seconds', '5 seconds ago', '1 month',
                    'infinity', repeat('5 s ', 30), 'NaN', '25d', '25 days']) AS value;
SELECT name, try_option(name, '-1') AS negative, try_option(name, 'soon') AS soon
  FROM unnest(ARRAY['jitter', 'timeout', 'backoff', 'shutdown',
                    'batch_time', 'handler_timeout']) AS name;

SELECT value, try_option('batch_size', value)
  FROM unnest(ARRAY['1', '1000', '100000', '0', '-1', '100001', '99999999999',
                    'many', '', '10s']) AS value;

-- Memory is written as settings write it; a bare number is kilobytes.
SELECT value, try_option('max_memory', value)
  FROM unnest(ARRAY['0', '64', '64kB', '65536B', '1.5MB', '64 MB', '1GB', '2147483647',
                    '63', '1', '-1', '2147483648', '1e99', '4TB', '64mb', '5s',
                    'much', '']) AS value;

SELECT value, try_option('restart', value)
  FROM unnest(ARRAY['transient', 'temporary', 'permanent', 'Transient', '']) AS value;

SELECT value, try_option('when_full', value)
  FROM unnest(ARRAY['error', 'discard', 'block', 'Discard', '']) AS value;

SELECT value, try_option('stopped', value)
  FROM unnest(ARRAY['true', 'false', 'on', 'off', 'yes', 'no', '1', '0', 'maybe',
                    '']) AS value;

-- The handler is a name; whether there is such a function is seen when it is
-- needed, because it may be made later.
SELECT value, try_option('handler', value)
  FROM unnest(ARRAY['handle_flush', 'public.handle_flush', '"My app"."My handler"',
                    'no_such_function', '', ' ', '.', 'a b', 'a.',
                    '"unfinished', 'a.b.c.d', 'f(text, bigint)']) AS value;

-- An option that there is not, in spite of looking like one.
SELECT name, try_option(name, '1')
  FROM unnest(ARRAY['no_such_option', 'Interval', 'batch-size', 'host', 'user']) AS name;
\x off

-- The same words when the buffer is made.
CREATE FOREIGN TABLE bad (key text, count bigint)
  SERVER statbuffer OPTIONS (intervall '5s');
\echo :LAST_ERROR_SQLSTATE
CREATE FOREIGN TABLE bad (key text, count bigint)
  SERVER statbuffer OPTIONS (interval 'soon');
\echo :LAST_ERROR_SQLSTATE
CREATE FOREIGN TABLE bad (key text, count bigint)
  SERVER statbuffer OPTIONS (batch_size '0');
\echo :LAST_ERROR_SQLSTATE
CREATE FOREIGN TABLE bad (key text, count bigint)
  SERVER statbuffer OPTIONS (interval '1s', interval '2s');
CREATE FOREIGN TABLE bad (key text, count bigint)
  SERVER statbuffer OPTIONS (max_memory '10kB');
\echo :LAST_ERROR_SQLSTATE
SELECT to_regclass('bad');

-- ADD, SET and DROP, each where it fits.
ALTER FOREIGN TABLE buf OPTIONS (ADD interval '1h', ADD jitter '1min');
ALTER FOREIGN TABLE buf OPTIONS (SET interval '2h', DROP jitter, ADD timeout '1h');
SELECT ftoptions FROM pg_foreign_table WHERE ftrelid = 'buf'::regclass;
ALTER FOREIGN TABLE buf OPTIONS (SET interval 'soon');
ALTER FOREIGN TABLE buf OPTIONS (SET jitter '1s');
ALTER FOREIGN TABLE buf OPTIONS (DROP jitter);
ALTER FOREIGN TABLE buf OPTIONS (ADD interval '1h');
ALTER FOREIGN TABLE buf OPTIONS (DROP interval, SET timeout '1s', ADD jitter '-1');
SELECT ftoptions FROM pg_foreign_table WHERE ftrelid = 'buf'::regclass;

-- A change takes effect at once.  What was to wait for hours is flushed.
SELECT count(sb_increment('k' || i, 5, 'buf')) FROM generate_series(1, 10) AS i;
SELECT sum(count), bool_and(due_at > now() + interval '119 min') AS late
  FROM sb_keys('buf') WHERE count > 0;
ALTER FOREIGN TABLE buf OPTIONS (SET interval '10ms');
SELECT wait_until('NOT EXISTS (SELECT FROM buf)');
-- Also when it is counted while the worker has nothing else to do,
ALTER FOREIGN TABLE buf OPTIONS (SET interval '2h');
SELECT sb_increment('k', 5, 'buf');
SELECT wait_until($$ (SELECT oldest_due > now() FROM sb_stat_buffers
                      WHERE buffer = 'buf') $$);
SELECT sb_increment('k2', 5, 'buf');
ALTER FOREIGN TABLE buf OPTIONS (SET interval '10ms');
SELECT wait_until('NOT EXISTS (SELECT FROM buf)');
-- and when there is no worker any more.
ALTER FOREIGN TABLE buf OPTIONS (SET interval '02:00:00', SET timeout '00:00:00.01');
SELECT sb_increment('k', 5, 'buf');
SELECT wait_until($$ (SELECT pid IS NULL AND state = 'idle' FROM sb_stat_buffers
                      WHERE buffer = 'buf') $$);
ALTER FOREIGN TABLE buf OPTIONS (SET interval '10ms', SET timeout '1h');
SELECT wait_until('NOT EXISTS (SELECT FROM buf)');
-- What was to be flushed soon is, in the other direction, put off.
ALTER FOREIGN TABLE buf OPTIONS (SET interval '30 minutes');
SELECT sb_increment('k', 5, 'buf');
SELECT due_at BETWEEN now() + interval '29 min' AND now() + interval '31 min' AS later
  FROM sb_keys('buf') WHERE count > 0;
-- Up to the jitter is added.
ALTER FOREIGN TABLE buf OPTIONS (ADD jitter '30min');
SELECT count(sb_increment('j' || i, 1, 'buf')) FROM generate_series(1, 1000) AS i;
SELECT min(due_at) BETWEEN now() + interval '29 min' AND now() + interval '35 min' AS least,
       max(due_at) BETWEEN now() + interval '55 min' AND now() + interval '61 min' AS most
  FROM sb_keys('buf') WHERE key LIKE 'j%';
-- Without its option it is 5 seconds again.
ALTER FOREIGN TABLE buf OPTIONS (DROP interval, DROP jitter);
SELECT sb_increment('k2', 5, 'buf');
SELECT coalesce(max(due_at) <= now() + interval '5 s', true) AS soon
  FROM sb_keys('buf') WHERE key = 'k2';
SELECT sb_drain('buf');
SELECT count(*) FROM buf;

-- "stopped" can be set by hand, too.
ALTER FOREIGN TABLE buf OPTIONS (ADD stopped 'yes');
SELECT sb_increment('k', buffer => 'buf');
ALTER FOREIGN TABLE buf OPTIONS (SET stopped 'no');
SELECT sb_increment('k', buffer => 'buf');
DROP FOREIGN TABLE buf;

-- Neither the wrapper nor a server nor a column nor a user has options.
ALTER FOREIGN DATA WRAPPER statbuffer OPTIONS (ADD interval '5s');
\echo :LAST_ERROR_SQLSTATE
ALTER SERVER statbuffer OPTIONS (ADD interval '5s');
CREATE SERVER another FOREIGN DATA WRAPPER statbuffer OPTIONS (host 'example.org');
CREATE USER MAPPING FOR CURRENT_USER SERVER statbuffer OPTIONS (password 'secret');
CREATE FOREIGN TABLE bad (key text OPTIONS (interval '5s'), count bigint)
  SERVER statbuffer;
SELECT srvname FROM pg_foreign_server ORDER BY srvname;

DROP FUNCTION handle_flush(text, bigint);
DROP FUNCTION try_option;
