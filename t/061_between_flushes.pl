# What a worker leaves behind when it has flushed: its writes are seen by the
# statistics and by autovacuum, no lock or snapshot is held between flushes, and
# pg_stat_activity tells what each process is doing.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = new_node('waste', 'autovacuum_naptime = 1s', q{shared_preload_libraries = 'statbuffer'});

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
wait_for($node, $db, q{SELECT handler_calls > 100 FROM sb_stat_buffers WHERE buffer = 'busy'}, 'a worker is busy');
my $worker = worker_of($node, $db, 'busy');
wait_for($node, $db, q{SELECT n_tup_ins > 0 AND n_tup_upd > 500 FROM pg_stat_user_tables WHERE relid = 'totals'::regclass},
	'its writes are told to the statistics while it goes on');
wait_for($node, $db, q{SELECT autovacuum_count > 0 AND autoanalyze_count > 0 FROM pg_stat_user_tables WHERE relid = 'totals'::regclass},
	'and autovacuum sees to the table');
is(worker_of($node, $db, 'busy'), $worker, 'all that with the same worker');
sql(q{INSERT INTO enough VALUES ('autovacuum has come')});
$counting->query_safe('SELECT 1');
$counting->quit;

# The last flush before a rest is told as well: the worker need not leave.
sql(q{SELECT sb_drain('busy'); INSERT INTO busy SELECT 'new ' || i FROM generate_series(1, 7) i; SELECT sb_drain('busy')});
wait_for($node, $db, q{SELECT n_tup_ins = 12 FROM pg_stat_user_tables WHERE relid = 'totals'::regclass},
	'what a worker wrote before it rests is told, to the last row');
is(worker_of($node, $db, 'busy'), $worker, 'while it rests');

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
$worker = worker_of($node, $db, 'held');
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
wait_for($node, $db, q{SELECT in_flight = 0 FROM sb_stat_buffers WHERE buffer = 'held'}, 'the handler goes on');
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
wait_for($node, $db, q{SELECT pending = 0 AND in_flight = 0 FROM sb_stat_buffers WHERE buffer = 'held'}, 'it is cancelled, and comes again');
holds_nothing($worker, 'a worker that was cancelled');
sql(q{ALTER FOREIGN TABLE held OPTIONS (SET backoff '2h'); INSERT INTO held VALUES ('a')});
holds_nothing($worker, 'a worker whose buffer was altered');
is(worker_of($node, $db, 'held'), $worker, 'it was the same one all the time');

has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
