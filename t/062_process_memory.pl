# No process grows, however long it runs: neither a worker, through flushes and
# failures, nor a session, nor the launcher; and no shared memory is left
# behind.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use WasteTest;

my $db = 'postgres';

# Dynamic shared memory in files, so that its size can be seen.
my $node = new_node('waste', q{shared_preload_libraries = 'statbuffer'},
	'statbuffer.max_workers = 12',
	'dynamic_shared_memory_type = mmap');

# --- memory of workers ------------------------------------------------------

# A thousand rounds of count and flush, and then nine thousand more: what the
# process uses is the same.  For each form of a handler, and for keys of
# several columns, with types that take some memory to handle.
sql(q{
	CREATE TABLE totals (key text PRIMARY KEY, n bigint NOT NULL);
	CREATE TYPE place AS (x int, name text);
	CREATE FUNCTION by_key(a int, p place, n numeric, k text[], counter bigint) RETURNS void
	LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO totals VALUES (concat(a, p, k), counter)
		ON CONFLICT (key) DO UPDATE SET n = totals.n + EXCLUDED.n;
	END $$;
	CREATE FOREIGN TABLE by_key (a int NOT NULL, p place, n numeric, k text[], count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'by_key', interval '0', timeout '1h');
	CREATE FUNCTION by_arrays(a int[], p place[], n numeric[], counters bigint[]) RETURNS boolean
	LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO totals
		SELECT concat(a[i], p[i]), counters[i] FROM generate_subscripts(a, 1) i
		ON CONFLICT (key) DO UPDATE SET n = totals.n + EXCLUDED.n;
		RETURN true;
	END $$;
	CREATE FOREIGN TABLE by_arrays (a int NOT NULL, p place, n numeric, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'by_arrays', interval '0', timeout '1h');

	CREATE PROCEDURE rounds_by_key(n int) LANGUAGE plpgsql AS $$
	BEGIN
		FOR i IN 1 .. n LOOP
			INSERT INTO by_key VALUES (i % 3, ROW(i % 5, 'x'), 1.0, ARRAY['a']), (i % 3, ROW(i % 5, 'x'), 1.00, ARRAY['a']), (i % 7, NULL, NULL, NULL);
			COMMIT;
			PERFORM sb_drain('by_key');
		END LOOP;
	END $$;
	CREATE PROCEDURE rounds_by_arrays(n int) LANGUAGE plpgsql AS $$
	BEGIN
		FOR i IN 1 .. n LOOP
			INSERT INTO by_arrays VALUES (i % 3, ROW(i % 5, 'x'), 1.0), (i % 3, ROW(i % 5, 'x'), 1.00), (i % 7, NULL, NULL);
			COMMIT;
			PERFORM sb_drain('by_arrays');
		END LOOP;
	END $$;

	-- These fail, each time with other words: all keys of a batch together,
	-- and then each on its own.
	CREATE SEQUENCE attempts;
	CREATE FUNCTION failing_key(key text, counter bigint) RETURNS void
	LANGUAGE plpgsql AS $$ BEGIN RAISE 'attempt %', nextval('attempts') USING DETAIL = repeat('d', 1000), HINT = 'none'; END $$;
	CREATE FOREIGN TABLE failing_key (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'failing_key', interval '0', timeout '1h', backoff '1ms');
	CREATE FUNCTION failing_arrays(keys text[], counters bigint[]) RETURNS boolean
	LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO totals SELECT * FROM unnest(keys, counters);
		BEGIN
			RAISE 'attempt %', nextval('attempts');
		EXCEPTION WHEN raise_exception THEN
			RETURN false;
		END;
	END $$;
	CREATE FOREIGN TABLE failing_arrays (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'failing_arrays', interval '0', timeout '1h', backoff '1ms');
	CREATE FOREIGN TABLE failing_once (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'failing_key', interval '0', timeout '1h', restart 'temporary');
});
sql($fail_procedure);
my %rounds = (
	by_key => 'CALL rounds_by_key(%d)',
	by_arrays => 'CALL rounds_by_arrays(%d)',
	map { $_ => "CALL fail('$_', %d)" } qw(failing_key failing_arrays failing_once));
for my $buffer (sort keys %rounds)
{
	sql(sprintf $rounds{$buffer}, 1000);
	my $pid = worker_of($node, $db, $buffer);
	my $used = memory_used($node, $pid);
	my $shared = shared_memory($node);

	sql(sprintf $rounds{$buffer}, 9000);
	has_not_grown($used, memory_used($node, $pid), "$buffer: a worker does not grow in 9,000 rounds");
	is(worker_of($node, $db, $buffer), $pid, "$buffer: it was the same one all the time");
	has_not_grown($shared, shared_memory($node), "$buffer: nor does shared memory", $segments);
}
is(sql(q{SELECT count(*) > 0, bool_and(failures >= 10000) FROM sb_stat_buffers WHERE buffer LIKE 'failing%'}),
	't|t', 'there were failures enough');
sql("DROP FOREIGN TABLE $_") for keys %rounds;
my ($launcher) = processes($node, 'statbuffer launcher');

# --- memory of sessions -----------------------------------------------------

# A session does everything that a session can do, in a thousand transactions,
# and then in nine thousand more.
make_buffer($node, $db, 'many', q{interval '1s', timeout '1h'});
sql(q{
	CREATE FOREIGN TABLE pairs (a int NOT NULL, p place, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'pairs_store', interval '1h');
	CREATE FUNCTION pairs_store(a int[], p place[], counters bigint[]) RETURNS void LANGUAGE sql AS '';
});
my $script = $node->basedir . '/session.sql';
append_to_file($script, join '', map { qq{
	SELECT sb_increment('key $_', 1, 'many');
	SELECT sb_increment(ROW($_ % 10, ROW(1, 'x')::place), 1, 'pairs') FROM generate_series(1, 3);
	SELECT sb_async_increment('async $_', 1, 'many'), sb_count('async $_', 'many'), sb_flush('async $_', 'many');
	INSERT INTO pairs SELECT i, NULL, i FROM generate_series(1, 20) i;
	BEGIN; SELECT sb_increment('key', 1, 'many'); SAVEPOINT s; SELECT sb_increment('key', 1, 'many'); ROLLBACK TO s; COMMIT;
	BEGIN; INSERT INTO many SELECT 'k' || i, 1 FROM generate_series(1, 100) i; ROLLBACK;
	SELECT sb_increment(NULL, 1, 'many');
	SELECT count(*) FROM many;
	SELECT count(*) FROM sb_keys('pairs');
	SELECT count(*) FROM sb_stat_buffers;
} } 1 .. 100);
my $session = $node->background_psql($db, on_error_stop => 0, timeout => 5 * $PostgreSQL::Test::Utils::timeout_default);
$session->query("SET log_statement = 'none'; SET log_min_messages = 'log'; SET client_min_messages = 'error'");
my $pid = $session->query('SELECT pg_backend_pid()');
$session->query("\\i $script\n\\echo done");
my $used = memory_used($node, $pid);
$session->query("\\i $script") for 1 .. 9;
has_not_grown($used, memory_used($node, $pid), 'a session does not grow in 9,000 transactions');
cmp_ok(sql(q{SELECT increments FROM sb_stat_buffers WHERE buffer = 'many'}), '>=', 3000, 'it did count');
is(sql("SELECT count(*) FROM pg_locks WHERE pid = $pid"), '0', 'it holds no lock');

$session->quit;

# --- memory of the launcher -------------------------------------------------

# Ten buffers whose workers leave as soon as they have nothing to do.
sql(q{
	CREATE TABLE workers (pid int);
	CREATE FUNCTION note_worker(key text, counter bigint) RETURNS void LANGUAGE sql
	AS 'INSERT INTO workers VALUES (pg_backend_pid())';
	CREATE PROCEDURE start_workers(n int) LANGUAGE plpgsql AS $$
	BEGIN
		FOR i IN 1 .. n LOOP
			PERFORM sb_increment('k', 1, ('brief_' || b)::regclass) FROM generate_series(1, 10) b;
			COMMIT;
			LOOP
				EXIT WHEN NOT EXISTS (
					SELECT FROM sb_stat_buffers WHERE buffer LIKE 'brief%' AND (pid IS NOT NULL OR pending + in_flight > 0));
				PERFORM pg_sleep(0.002);
			END LOOP;
		END LOOP;
	END $$;
});
sql("CREATE FOREIGN TABLE brief_$_ (key text NOT NULL, count bigint NOT NULL DEFAULT 1) SERVER statbuffer OPTIONS (handler 'note_worker', interval '0', timeout '0')")
  for 1 .. 10;
sql('CALL start_workers(10)');
$used = memory_used($node, $launcher);
sql('CALL start_workers(90)');
has_not_grown($used, memory_used($node, $launcher), 'the launcher does not grow with the workers that it starts');
cmp_ok(sql('SELECT count(DISTINCT pid) FROM workers'), '>=', 500, 'there were hundreds');
is_deeply([ processes($node, 'statbuffer launcher') ], [$launcher], 'and one launcher');
sql("DROP FOREIGN TABLE brief_$_") for 1 .. 10;

has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
