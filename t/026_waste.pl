# What nobody sees while all goes well: the workers' writes are seen by
# autovacuum, no process grows, no lock or snapshot is held between flushes,
# shared memory does not fill up, a lasting failure does not fill the log; and
# pg_stat_activity tells what each process is doing.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(usleep);

my $db = 'postgres';

# Dynamic shared memory in files, so that its size can be seen.
my $node = new_node('waste',
	'statbuffer.max_workers = 12',
	'autovacuum_naptime = 1s',
	'dynamic_shared_memory_type = mmap');

sub sql { return $node->safe_psql($db, $_[0]); }

sub worker_of
{
	my ($buffer) = @_;

	return sql("SELECT pid FROM sb_stat_buffers WHERE buffer = '$buffer'::regclass");
}

# What a process has allocated and uses, as it says in the log.
sub memory_used
{
	my ($pid) = @_;
	my $offset = -s $node->logfile;

	is(sql("SELECT pg_log_backend_memory_contexts($pid)"), 't', "process $pid is asked for its memory");
	$node->wait_for_log(qr/\[$pid\].* Grand total: .*; \d+ used/, $offset);
	slurp_file($node->logfile, $offset) =~ /\[$pid\].* Grand total: .*; (\d+) used/;
	return $1;
}

# Caches come and go, but what is left behind each time takes more than this.
my $tolerance = 64 * 1024;

sub has_not_grown
{
	my ($before, $after, $what, $bound) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	cmp_ok($after - $before, '<', $bound // $tolerance, $what);
	note "$what: $before bytes, later $after";
}

# It comes in segments of a megabyte or more.
my $segments = 2.5 * 1024 * 1024;

sub shared_memory
{
	my $sum = 0;

	$sum += -s $_ // 0 foreach glob $node->data_dir . '/pg_dynshmem/*';
	return $sum;
}

# --- autovacuum -------------------------------------------------------------

# The handler updates a few rows again and again.  The worker never has a
# pause: somebody counts until there is a row in "enough".
sql(q{
	CREATE TABLE totals (key text PRIMARY KEY, n bigint NOT NULL)
	WITH (autovacuum_vacuum_threshold = 50, autovacuum_vacuum_scale_factor = 0,
		autovacuum_analyze_threshold = 50, autovacuum_analyze_scale_factor = 0);
	CREATE FUNCTION add(key text, counter bigint) RETURNS void LANGUAGE sql AS $$
		INSERT INTO totals VALUES (key, counter)
		ON CONFLICT (key) DO UPDATE SET n = totals.n + EXCLUDED.n
	$$;
	CREATE FOREIGN TABLE busy (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'add', interval '0', timeout '1h');
	CREATE TABLE enough (why text);
	CREATE PROCEDURE count_on() LANGUAGE plpgsql AS $$
	BEGIN
		LOOP
			PERFORM sb_increment('key ' || i, 1, 'busy') FROM generate_series(1, 5) i;
			COMMIT;
			EXIT WHEN EXISTS (SELECT FROM enough);
			PERFORM pg_sleep(0.001);
		END LOOP;
	END
	$$;
});
my $counting = $node->background_psql($db);
$counting->query_until(qr/counting/, "\\echo counting\nCALL count_on();\n");
wait_for($node, $db, q{SELECT handler_calls > 100 FROM sb_stat_buffers WHERE buffer = 'busy'::regclass}, 'a worker is busy');
my $worker = worker_of('busy');
wait_for($node, $db, q{SELECT n_tup_ins > 0 AND n_tup_upd > 500 FROM pg_stat_user_tables WHERE relid = 'totals'::regclass},
	'its writes are told to the statistics while it goes on');
wait_for($node, $db, q{SELECT autovacuum_count > 0 AND autoanalyze_count > 0 FROM pg_stat_user_tables WHERE relid = 'totals'::regclass},
	'and autovacuum sees to the table');
is(worker_of('busy'), $worker, 'all that with the same worker');
sql(q{INSERT INTO enough VALUES ('autovacuum has come')});
$counting->query_safe('SELECT 1');
$counting->quit;

# The last flush before a rest is told as well: the worker need not leave.
sql(q{SELECT sb_drain('busy'); INSERT INTO busy SELECT 'new ' || i FROM generate_series(1, 7) i; SELECT sb_drain('busy')});
wait_for($node, $db, q{SELECT n_tup_ins = 12 FROM pg_stat_user_tables WHERE relid = 'totals'::regclass},
	'what a worker wrote before it rests is told, to the last row');
is(worker_of('busy'), $worker, 'while it rests');

# --- locks and snapshots ----------------------------------------------------

# Nothing keeps a worker from resting with keys held.
sub holds_nothing
{
	my ($pid, $when) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($node, $db, qq{
			SELECT state = 'idle' AND xact_start IS NULL AND backend_xid IS NULL AND backend_xmin IS NULL
				AND NOT EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid)
			FROM pg_stat_activity a WHERE pid = $pid},
		"$when: no lock, no transaction, no snapshot");
}

sql(q{
	CREATE ROLE keeper LOGIN;
	GRANT USAGE ON FOREIGN SERVER statbuffer TO keeper;
	GRANT CREATE ON SCHEMA public TO keeper;
});
make_buffer($node, $db, 'held', q{interval '1h', timeout '1h', backoff '1h'});
sql(q{
	ALTER FUNCTION held_store OWNER TO keeper;
	ALTER TABLE held_calls OWNER TO keeper;
	ALTER TABLE held_bad OWNER TO keeper;
	ALTER FOREIGN TABLE held OWNER TO keeper;
	INSERT INTO held VALUES ('a'), ('b'), ('c');
	SELECT sb_drain('held');
	INSERT INTO held VALUES ('a'), ('b'), ('c');
});
my ($launcher) = processes($node, 'statbuffer launcher');
holds_nothing($launcher, 'the launcher');
$worker = worker_of('held');
holds_nothing($worker, 'a worker that holds keys');

# --- pg_stat_activity -------------------------------------------------------

is(sql("SELECT backend_type, state, query, datname, wait_event_type FROM pg_stat_activity WHERE pid = $launcher"),
	'statbuffer launcher|idle|||Extension', 'pg_stat_activity tells of the launcher');
is(sql("SELECT backend_type, state, query, datname, usename, wait_event_type FROM pg_stat_activity WHERE pid = $worker"),
	'statbuffer worker|idle|held|postgres|keeper|Extension', 'and of a worker that rests, and whose');
my $gate = close_gate($node, $db);
sql(q{SELECT sb_flush_all('held')});
wait_for($node, $db, "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $worker", 'a handler waits');
is(sql("SELECT backend_type, state, query, datname, usename, wait_event, xact_start IS NOT NULL FROM pg_stat_activity WHERE pid = $worker"),
	'statbuffer worker|active|held: flushing 3 keys|postgres|keeper|advisory|t', 'pg_stat_activity tells that it flushes, and waits for what');
is(sql("SELECT pid FROM sb_stat_buffers WHERE in_flight = 3"), $worker, 'as does our own view');
open_gate($gate);
wait_for($node, $db, q{SELECT in_flight = 0 FROM sb_stat_buffers WHERE buffer = 'held'::regclass}, 'the handler goes on');
holds_nothing($worker, 'a worker that has flushed');
is(sql("SELECT query, state, wait_event_type FROM pg_stat_activity WHERE pid = $worker"), 'held|idle|Extension', 'it is told to rest again');

# The same after a failure, after a cancel, and after a look at a changed
# definition.
sql(q{INSERT INTO held_bad VALUES ('a'); INSERT INTO held VALUES ('a'), ('b'), ('c'); SELECT sb_flush_all('held')});
wait_for($node, $db, q{SELECT failures = 1 FROM sb_keys('held') WHERE key = 'a'}, 'a key fails');
holds_nothing($worker, 'a worker that has failed');
$gate = close_gate($node, $db);
sql(q{DELETE FROM held_bad; SELECT sb_flush_all('held')});
wait_for($node, $db, "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $worker", 'a handler waits');
sql("SELECT pg_cancel_backend($worker)");
open_gate($gate);
wait_for($node, $db, q{SELECT pending = 0 AND in_flight = 0 FROM sb_stat_buffers WHERE buffer = 'held'::regclass}, 'it is cancelled, and comes again');
holds_nothing($worker, 'a worker that was cancelled');
sql(q{ALTER FOREIGN TABLE held OPTIONS (SET backoff '2h'); INSERT INTO held VALUES ('a')});
holds_nothing($worker, 'a worker whose buffer was altered');
is(worker_of('held'), $worker, 'it was the same one all the time');

# --- memory of workers ------------------------------------------------------

# A thousand rounds of count and flush, and then nine thousand more: what the
# process uses is the same.  For each form of a handler, and for keys of
# several columns, with types that take some memory to handle.
sql(q{
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

	-- Until so many attempts have failed.  A request makes all keys due.
	CREATE PROCEDURE fail(b regclass, n int) LANGUAGE plpgsql AS $$
	DECLARE
		goal bigint := n + failures FROM sb_stat_buffers WHERE buffer = b;
		last bigint := -1;
		so_far bigint;
	BEGIN
		LOOP
			SELECT failures INTO so_far FROM sb_stat_buffers WHERE buffer = b;
			EXIT WHEN so_far >= goal;
			IF so_far <> last THEN
				PERFORM sb_increment('key ' || so_far % 7, 1, b), sb_increment('other ' || so_far % 5, 1, b);
				COMMIT;
				PERFORM sb_flush_all(b);
			ELSE
				PERFORM pg_sleep(0.0005);
			END IF;
			last := so_far;
		END LOOP;
	END $$;
});
my %rounds = (
	by_key => 'CALL rounds_by_key(%d)',
	by_arrays => 'CALL rounds_by_arrays(%d)',
	map { $_ => "CALL fail('$_', %d)" } qw(failing_key failing_arrays failing_once));
for my $buffer (sort keys %rounds)
{
	sql(sprintf $rounds{$buffer}, 1000);
	my $pid = worker_of($buffer);
	my $used = memory_used($pid);
	my $shared = shared_memory();

	sql(sprintf $rounds{$buffer}, 9000);
	has_not_grown($used, memory_used($pid), "$buffer: a worker does not grow in 9,000 rounds");
	is(worker_of($buffer), $pid, "$buffer: it was the same one all the time");
	has_not_grown($shared, shared_memory(), "$buffer: nor does shared memory", $segments);
}
is(sql(q{SELECT count(*) > 0, bool_and(failures >= 10000) FROM sb_stat_buffers WHERE buffer::text LIKE 'failing%'}),
	't|t', 'there were failures enough');
sql("DROP FOREIGN TABLE $_") for keys %rounds;

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
my $used = memory_used($pid);
$session->query("\\i $script") for 1 .. 9;
has_not_grown($used, memory_used($pid), 'a session does not grow in 9,000 transactions');
cmp_ok(sql(q{SELECT increments FROM sb_stat_buffers WHERE buffer = 'many'::regclass}), '>=', 3000, 'it did count');
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
					SELECT FROM sb_stat_buffers WHERE buffer::text LIKE 'brief%' AND (pid IS NOT NULL OR pending + in_flight > 0));
				PERFORM pg_sleep(0.002);
			END LOOP;
		END LOOP;
	END $$;
});
sql("CREATE FOREIGN TABLE brief_$_ (key text NOT NULL, count bigint NOT NULL DEFAULT 1) SERVER statbuffer OPTIONS (handler 'note_worker', interval '0', timeout '0')")
  for 1 .. 10;
sql('CALL start_workers(10)');
$used = memory_used($launcher);
sql('CALL start_workers(90)');
has_not_grown($used, memory_used($launcher), 'the launcher does not grow with the workers that it starts');
cmp_ok(sql('SELECT count(DISTINCT pid) FROM workers'), '>=', 900, 'there were about a thousand');
is_deeply([ processes($node, 'statbuffer launcher') ], [$launcher], 'and one launcher');
sql("DROP FOREIGN TABLE brief_$_") for 1 .. 10;

# --- the log ----------------------------------------------------------------

# Three hundred keys fail, each again and again.  The log says so once, and
# then, when something else happens, how often it has not.
my $offset = -s $node->logfile;
sql(q{
	CREATE TABLE reason (code text);
	INSERT INTO reason VALUES ('P0001');
	CREATE FUNCTION noisy_store(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		RAISE 'no, not %', key USING ERRCODE = (SELECT code FROM reason);
	END $$;
	CREATE FOREIGN TABLE noisy (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'noisy_store', interval '0', timeout '1h', backoff '1ms');
	INSERT INTO noisy SELECT 'key ' || i FROM generate_series(1, 300) i;
});
wait_for($node, $db, q{SELECT failures > 1000 FROM sb_stat_buffers WHERE buffer = 'noisy'::regclass}, 'a thousand attempts fail');
cmp_ok(lines_in_log($node, qr/could not flush .*"noisy"/, $offset), '<=', 3, 'the log tells of a few of them');
sql(q{UPDATE reason SET code = '22012'});
$node->wait_for_log(qr/could not flush .*"noisy".*\n(?:.*\n)*?.*\d+ failures since the last such message/, $offset);
my ($suppressed) = slurp_file($node->logfile, $offset) =~ /(\d+) failures since the last such message/;
cmp_ok($suppressed, '>', 900, 'and then, of how many it did not');
cmp_ok($suppressed, '<=', sql(q{SELECT failures FROM sb_stat_buffers WHERE buffer = 'noisy'::regclass}), 'which is right');
sql('DROP FOREIGN TABLE noisy');

# The same for counts that are discarded: no more lines, and not one count less.
$offset = -s $node->logfile;
sql(q{
	CREATE FOREIGN TABLE careless (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'noisy_store', interval '0', timeout '100ms', restart 'temporary');
	INSERT INTO careless SELECT 'key ' || i, 3 FROM generate_series(1, 500) i;
});
wait_for($node, $db, q{SELECT discarded = 1500 AND pid IS NULL FROM sb_stat_buffers WHERE buffer = 'careless'::regclass},
	'500 keys are discarded, and the worker has left');
my @discarded = slurp_file($node->logfile, $offset) =~ /discarded counts of buffer "careless": (\d+)/g;
cmp_ok(scalar @discarded, '<=', 5, 'the log tells it in a few lines');
is(eval { my $sum = 0; $sum += $_ for @discarded; $sum }, 1500, 'and tells of everything');

# A handler that is missing keeps the buffer from being flushed at all.  Its
# worker does not stay for that; but another one comes with each request.
$offset = -s $node->logfile;
sql(q{
	CREATE FOREIGN TABLE broken (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'no_such_handler', interval '0', timeout '1h', backoff '1ms');
	SELECT sb_increment('k', 1, 'broken');
	CALL fail('broken', 500);
});
cmp_ok(lines_in_log($node, qr/could not flush buffer "broken"/, $offset), '<=', 3, 'a buffer that is broken does not fill the log either');

sub has_not_crashed
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, 'no process has crashed');
	$node->stop;
}

has_not_crashed();

# --- buffers that come and go -----------------------------------------------

# Little memory, so that what is not given back is missed.  How much is in use
# can't be seen: it comes in segments, and one of them stays where anything is
# left in it, such as the list of all buffers, which moves when it grows.  But
# there is an end to it, and how many of the largest keys there is room for
# tells to 25 of them, a block of 64 kB, what is in use.
$node = new_node('room',
	'statbuffer.max_memory = 4MB',
	'statement_timeout = ' . 5 * $PostgreSQL::Test::Utils::timeout_default . 's',
	'dynamic_shared_memory_type = mmap');
sql(q{
	CREATE FUNCTION forget(key text, counter bigint) RETURNS void LANGUAGE sql AS '';
	CREATE FOREIGN TABLE sweeper (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'forget', interval '0', timeout '0');

	-- A worker that starts frees what other buffers of its database have left.
	CREATE PROCEDURE wait_for_workers() LANGUAGE plpgsql AS $$
	BEGIN
		WHILE EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'statbuffer worker' AND query NOT LIKE 'asked%') LOOP
			PERFORM pg_sleep(0.001);
		END LOOP;
		COMMIT;
	END $$;
	CREATE PROCEDURE sweep() LANGUAGE plpgsql AS $$
	BEGIN
		CALL wait_for_workers();
		LOOP
			BEGIN
				PERFORM sb_async_increment('k', 1, 'sweeper');
				EXIT;
			EXCEPTION WHEN out_of_memory THEN
				PERFORM pg_sleep(0.01);
			END;
		END LOOP;
		PERFORM sb_drain('sweeper');
		CALL wait_for_workers();
	END $$;
	CREATE PROCEDURE come_and_go(n int) LANGUAGE plpgsql AS $$
	BEGIN
		FOR i IN 1 .. n LOOP
			CREATE FOREIGN TABLE passing (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
			SERVER statbuffer OPTIONS (handler 'forget', interval '1h');
			PERFORM sb_increment('key ' || k, 1, 'passing') FROM generate_series(1, 3) k;
			COMMIT;
			DROP FOREIGN TABLE passing;
			COMMIT;
			IF i % 100 = 0 THEN
				CALL sweep();
			END IF;
		END LOOP;
	END $$;

	-- Nobody flushes these keys.
	CREATE PROCEDURE fill(INOUT n int) LANGUAGE plpgsql AS $$
	DECLARE
		wanted int := n;
	BEGIN
		CREATE FOREIGN TABLE full_of_keys (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler 'no_such', interval '1h', timeout '1h');
		COMMIT;
		n := 0;
		BEGIN
			WHILE n < wanted LOOP
				PERFORM sb_async_increment(rpad('key ' || n, 1996), 1, 'full_of_keys');
				n := n + 1;
			END LOOP;
		EXCEPTION WHEN out_of_memory THEN
			NULL;
		END;
	END $$;
	CREATE PROCEDURE measure_room(INOUT n int) LANGUAGE plpgsql AS $$
	BEGIN
		CALL fill(n);
		DROP FOREIGN TABLE full_of_keys;
		COMMIT;
		CALL sweep();
	END $$;
});
$session = $node->background_psql($db, timeout => 5 * $PostgreSQL::Test::Utils::timeout_default);
$pid = $session->query_safe('SELECT pg_backend_pid()');

# A hundred at first, so that what is allocated once is.
$session->query_safe('CALL come_and_go(100)');
my $room = sql('CALL measure_room(1000000)');
$used = memory_used($pid);
$session->query_safe('CALL come_and_go(4000)');
has_not_grown($used, memory_used($pid), 'a session grows by no more than what the server remembers of a relation', 4000 * 300);
$session->quit;
my $room_left = sql('CALL measure_room(1000000)');
cmp_ok($room, '>', 1000, 'there is room for many keys');
cmp_ok($room_left, '>=', $room - 25, 'and as much when 4,000 buffers have come and gone');
note "room for $room keys, later for $room_left";

# Who asks for a key's flush again and again, while the handler is at work,
# takes no more memory than who asks once.
make_buffer($node, $db, 'asked', q{interval '20ms', timeout '1h'});
$gate = close_gate($node, $db);
sql(q{SELECT sb_increment('k', 1, 'asked')});
wait_for($node, $db, q{SELECT in_flight = 1 FROM sb_stat_buffers WHERE buffer = 'asked'::regclass}, 'a handler waits');
sql(q{
	INSERT INTO asked SELECT 'key ' || i FROM generate_series(1, 100) i;
	CREATE PROCEDURE ask(n int) LANGUAGE plpgsql AS $$
	BEGIN
		FOR i IN 1 .. n LOOP
			PERFORM sb_flush('key ' || i % 200, 'asked'), sb_flush_all('asked');
		END LOOP;
	END $$;
	CALL ask(200);
});
$room = sql('CALL measure_room(1000000)');
sql('CALL ask(40000)');
$room_left = sql('CALL measure_room(1000000)');
cmp_ok($room_left, '>=', $room - 25, 'requests that are repeated take no shared memory');
note "room for $room keys, later for $room_left";
open_gate($gate);
wait_for_stored($node, $db, 'asked', 101, 'and are served');
sql(q{LOAD 'statbuffer'; DROP FOREIGN TABLE asked});
sql('CALL sweep()');

# When buffers are dropped, the memory goes back to the system; also when the
# last one is, although the launcher has seen all of it and has nothing to do.
# Keys first, so that the buffers are not in the segment that stays.
my @late = map { "late_$_" } 1 .. 40;

sub use_memory
{
	sql(q{CALL fill(900)});
	sql(qq{
		CREATE FOREIGN TABLE $_ (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler 'forget', interval '1h');
		SELECT sb_increment('k', 1, '$_');
	}) foreach @late;
	return shared_memory();
}

# A session without the library would tell nobody that they are dropped.
sub drop_and_wait
{
	my ($buffers, $bound, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	sql("LOAD 'statbuffer'; DROP FOREIGN TABLE " . join ', ', @$buffers);
	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		last if shared_memory() <= $bound;
		usleep(100_000);
	}
	cmp_ok(shared_memory(), '<=', $bound, $what);
}

my $full = use_memory();
drop_and_wait([ 'full_of_keys', @late ], $full - 1024 * 1024, 'memory is given back when buffers are dropped');
my $shared = shared_memory();
cmp_ok(use_memory(), '>', $shared, 'memory is used again');
drop_and_wait([ 'full_of_keys', @late, 'sweeper' ], $shared, 'and given back when all buffers are dropped');

has_not_crashed();
done_testing();
