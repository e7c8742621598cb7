# One worker slot for many buffers: a worker passes on from one buffer to
# another one of the same owner and database, and makes way for others.  Nobody
# starves, nothing of one buffer's handler is left for the next one's, and
# nothing is lost or stored twice, whatever comes at the moment of passing on.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use HandlerTest;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = new_node('one_slot', 'statbuffer.max_workers = 1',
	q{shared_preload_libraries = 'statbuffer'});

# close_gate_after(WHAT): a session that closes the gate as soon as the one that
# keeps it closed has opened it.
sub close_gate_after
{
	my ($what) = @_;
	my $session = $node->background_psql($db);

	$session->query_until(qr/closing/, "\\echo closing\nSELECT pg_advisory_lock(4713);\n");
	wait_for($node, $db, q{SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND objid = 4713
			AND NOT granted AND mode = 'ExclusiveLock'}, "$what: the gate will be closed again");
	return $session;
}

# What make_logged() needs in a database.
sub prepare_database
{
	my ($database) = @_;

	$node->safe_psql($database, q{
		CREATE TABLE calls (n serial, buffer text, key text, counter bigint, at timestamptz, pid int,
			path text, left_over text);
		CREATE TABLE gates (buffer text);
		CREATE TABLE deeds (buffer text, deed text);
		GRANT ALL ON calls, gates, deeds, calls_n_seq TO PUBLIC;
		GRANT CREATE ON SCHEMA public TO PUBLIC;
		GRANT USAGE ON FOREIGN SERVER statbuffer TO PUBLIC;
	});
	$node->safe_psql($database, left_over_function('public'));
	return;
}

# make_logged(DATABASE, OWNER, NAME, OPTIONS): a buffer whose handler notes what
# it is given, and by which process, in the table "calls".  If the table "gates"
# has the buffer, it waits until the gate is open; and it does what the table
# "deeds" has for it.
sub make_logged
{
	my ($database, $owner, $name, $options) = @_;

	$node->safe_psql($database, qq{
		SET ROLE $owner;
		CREATE FUNCTION ${name}_store(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS \$\$
		DECLARE
			what text;
		BEGIN
			INSERT INTO public.calls (buffer, key, counter, at, pid, path, left_over)
			VALUES ('$name', key, counter, clock_timestamp(), pg_backend_pid(),
				current_setting('search_path'),
				concat_ws(', ', nullif('role ' || current_user, 'role ' || session_user), nullif(public.left_over(), '')));
			IF EXISTS (SELECT FROM public.gates WHERE buffer = '$name') THEN
				PERFORM pg_advisory_xact_lock_shared(4713);
			END IF;
			FOR what IN SELECT deed FROM public.deeds WHERE buffer = '$name' LOOP
				EXECUTE what;
			END LOOP;
		END
		\$\$;
		CREATE FOREIGN TABLE $name (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler 'public.${name}_store', $options)});
	return;
}

# What the handlers of a buffer have been given, in all.
sub given
{
	my ($database, $buffer) = @_;

	return $node->safe_psql($database, "SELECT coalesce(sum(counter), 0) FROM calls WHERE buffer = '$buffer'");
}

sub wait_for_given
{
	my ($database, $buffer, $sum, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($node, $database, "SELECT coalesce(sum(counter), 0) = $sum FROM calls WHERE buffer = '$buffer'", $what);
	return;
}

# begin_with(BUFFER): its handler waits at the gate, so it has the only worker.
# Returns the session that keeps the gate closed.
sub begin_with
{
	my ($buffer, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $gate = close_gate($node, $db);
	sql(qq{
		DELETE FROM gates;
		INSERT INTO gates VALUES ('$buffer');
		SELECT sb_increment('k', 1, '$buffer'), sb_flush_all('$buffer')});
	wait_at_gate($node, $db, "$what: the worker is at the first buffer");
	return $gate;
}

# The processes of the last calls of buffers.
sub last_pids
{
	return map {
		sql("SELECT pid FROM calls WHERE buffer = '$_' ORDER BY n DESC LIMIT 1")
	} @_;
}

# --- two owners, two databases, one slot ------------------------------------

sql(q{CREATE ROLE ann LOGIN; CREATE ROLE ben LOGIN; CREATE ROLE boss LOGIN SUPERUSER; CREATE DATABASE another});
$node->safe_psql('another', 'CREATE EXTENSION statbuffer');
my @databases = ($db, 'another');
my @buffers = map { my $owner = $_; map { "${owner}_$_" } 1 .. 3 } qw(ann ben);
my $turns = 3;
foreach my $database (@databases)
{
	prepare_database($database);
	make_logged($database, (split /_/)[0], $_, q{interval '10ms', timeout '1h'}) foreach @buffers;
	$node->safe_psql($database, q{
		CREATE TABLE enough (x int);
		CREATE TABLE counted (n bigint);
		INSERT INTO counted VALUES (0);
		CREATE PROCEDURE count_until_enough() LANGUAGE plpgsql AS $$
		BEGIN
			WHILE NOT EXISTS (SELECT FROM enough) LOOP
				PERFORM sb_increment('k', 1, ftrelid::regclass) FROM pg_foreign_table;
				UPDATE counted SET n = n + 1;
				COMMIT;
				PERFORM pg_sleep(0.002);
			END LOOP;
		END
		$$;
		-- a turn: calls of a buffer in a row, in one process
		CREATE VIEW turns AS
			SELECT * FROM (SELECT *, (lag(buffer) OVER (ORDER BY n), lag(pid) OVER (ORDER BY n))
				IS DISTINCT FROM (buffer, pid) AS begins FROM calls) c WHERE begins});
}

# All are busy until each has had its turns; so if one had to wait until others
# have nothing to do, it would wait forever.
my @clients = map { start_session($node, $_, 'CALL count_until_enough()') } @databases;
foreach my $database (@databases)
{
	wait_for($node, $database, qq{
			SELECT count(*) = 6 FROM (SELECT FROM turns GROUP BY buffer HAVING count(*) >= $turns) t},
		"one slot: each buffer of $database has had its turns, though all others are busy");
}
foreach my $database (@databases)
{
	$node->safe_psql($database, 'INSERT INTO enough VALUES (1)');
}
finish_session($_, 'one slot: a client has done its work') foreach @clients;

my @turns;
foreach my $database (@databases)
{
	my $counted = $node->safe_psql($database, 'SELECT n FROM counted');

	foreach my $buffer (@buffers)
	{
		is($node->safe_psql($database, "SELECT sb_drain('$buffer')"), 't', "one slot: $database.$buffer is drained");
		is(given($database, $buffer), $counted, "one slot: $database.$buffer: each count is stored once");
	}
	is($node->safe_psql($database, q{
			SELECT count(*) FROM (SELECT pid FROM calls JOIN pg_foreign_table ON ftrelid = buffer::regclass
				JOIN pg_class c ON c.oid = ftrelid GROUP BY pid HAVING count(DISTINCT relowner) > 1) p}),
		'0', "one slot: in $database no process has served two owners");
	push @turns, map { [ $database, split /\|/ ] }
	  split /\n/, $node->safe_psql($database, q{SELECT buffer, pid, extract(epoch FROM at) FROM turns ORDER BY n});
}

# How many turns there were until the last buffer had had its own.  Each of the
# eleven that may be before a buffer may bring along a hundred others at most.
my ($until, %had, %processes) = (0);
foreach my $turn (sort { $a->[3] <=> $b->[3] } @turns)
{
	$until++;
	$processes{"$turn->[0] $turn->[2]"} = 1;
	last if ++$had{"$turn->[0].$turn->[1]"} == $turns && (grep { $_ >= $turns } values %had) == 12;
}
note "$until turns of " . scalar(keys %processes) . ' processes until each buffer had had ' . $turns;
cmp_ok($until, '<=', $turns * 12 * 101, 'one slot: a buffer waits for so many others at most');
cmp_ok(scalar(keys %processes), '<', scalar(@turns), 'one slot: workers passed on');

# --- what a handler leaves in the session -----------------------------------

make_logged($db, 'boss', $_, q{interval '1h', timeout '1h', backoff '1h'}) foreach qw(first second third);
my %deeds = (
	'a role' => q{SET ROLE ben},
	'another session user' => q{SET SESSION AUTHORIZATION ben},
	'a search path' => q{SET search_path = pg_temp, public},
	'settings' => q{SELECT set_config('work_mem', '77MB', false), set_config('statbuffer_test.custom', 'x', false)},
	'a temporary table' => q{CREATE TEMP TABLE calls (buffer text, key text)},
	'a prepared statement' => q{PREPARE p AS SELECT 1},
	'a cursor' => q{DECLARE c CURSOR WITH HOLD FOR SELECT 1},
	'a lock' => q{SELECT pg_advisory_lock(4714)},
	'an error after all that' => q{SET ROLE ben; SET search_path = pg_temp; CREATE TEMP TABLE calls (key text);
		SELECT pg_advisory_lock(4715); PREPARE p AS SELECT 1; SELECT 1 / 0});
my $same = 0;
foreach my $what (sort keys %deeds)
{
	sql(qq{TRUNCATE first, deeds; INSERT INTO deeds VALUES ('first', \$deed\$$deeds{$what}\$deed\$)});
	my $gate = begin_with('first', "left: $what");
	my ($pid) = sql(q{SELECT pid FROM sb_stat_buffers WHERE buffer = 'first'});
	sql(q{SELECT sb_increment('k', 1, 'second'), sb_flush_all('second')});
	open_gate($gate);
	is(sql(q{SELECT sb_drain('second', '60s')}), 't', "left: $what: the other buffer is flushed");
	is(sql(q{SELECT concat_ws('|', path, left_over) FROM calls WHERE buffer = 'second' ORDER BY n DESC LIMIT 1}),
		'"$user", public|', "left: $what: nothing of it is left for the other buffer");
	$same++ if (last_pids('second'))[0] == $pid;
}

# Once in a minute it is another process.
cmp_ok($same, '>=', keys(%deeds) / 2, 'left: it was the same process');
is(given($db, 'second'), scalar(keys %deeds), 'left: the other buffer has got each count once');
sql(q{TRUNCATE first, deeds});

# What a new session of the owner would have that this one has not.
my $gate = begin_with('first', 'search path');
sql(q{SELECT sb_increment('k', 1, 'second'), sb_flush_all('second')});
sql(q{CREATE SCHEMA elsewhere; ALTER ROLE boss SET search_path = elsewhere, public});
open_gate($gate);
is(sql(q{SELECT sb_drain('second', '60s')}), 't', 'search path: the other buffer is flushed');
is(sql(q{SELECT path FROM calls WHERE buffer = 'second' ORDER BY n DESC LIMIT 1}), 'elsewhere, public',
	"search path: with the owner's new one");

# --- a worker is terminated that has just passed on -------------------------

my $before = given($db, 'first') + given($db, 'second');
$gate = begin_with('first', 'terminated');
sql(q{INSERT INTO gates VALUES ('second'); SELECT sb_increment('k', 7, 'second'), sb_flush_all('second')});
my $other_gate = close_gate_after('terminated');
open_gate($gate);
wait_for($node, $db, q{SELECT in_flight = 7 FROM sb_stat_buffers WHERE buffer = 'second'},
	'terminated: the worker has passed on');
is(sql(q{SELECT count(*) FROM sb_stat_buffers WHERE pid IS NOT NULL}), '1', 'terminated: it has one buffer');
sql(q{SELECT pg_terminate_backend(pid) FROM sb_stat_buffers WHERE buffer = 'second'});
$other_gate->quit;
is(sql(q{SELECT bool_and(sb_drain(buffer, '60s')) FROM (VALUES ('first'::regclass), ('second')) b (buffer)}), 't',
	'terminated: both are drained by the next worker');
is(given($db, 'first') + given($db, 'second'), $before + 1 + 7, 'terminated: each count is stored once');

# --- sb_stop() and DROP of the buffer that is next ---------------------------

$before = given($db, 'second');
$gate = begin_with('first', 'sb_stop');
sql(q{SELECT sb_increment('k', 5, 'second'), sb_flush_all('second')});
my $stopper = start_session($node, $db, q{SELECT pending, in_flight FROM (SELECT sb_stop('second')) s, sb_stat_buffers
	WHERE buffer = 'second'});
wait_for_session($stopper, q{wait_event_type IN ('IPC', 'Extension')}, 'sb_stop: it waits for the buffer that is next');
open_gate($gate);
finish_session($stopper, 'sb_stop: done');
is(given($db, 'second'), $before + 5, 'sb_stop: what was counted is stored');
is(sql(q{SELECT state, pid IS NULL FROM sb_stat_buffers WHERE buffer = 'second'}), 'stopped|t',
	'sb_stop: it is stopped and has no worker');
sql(q{SELECT sb_start('second')});
is(sql(q{SELECT sb_drain('first', '60s')}), 't', 'sb_stop: all goes on');

# Dropped while it waits
my $offset = -s $node->logfile;
$gate = begin_with('first', 'DROP');
sql(q{SELECT sb_increment('k', 11, 'second'), sb_flush_all('second'), sb_increment('k', 3, 'third'), sb_flush_all('third')});
sql('DROP FOREIGN TABLE second');
open_gate($gate);
is(sql(q{SELECT sb_drain('third', '60s')}), 't', 'DROP: the buffer after it is flushed');
is(given($db, 'third'), 3, 'DROP: and stored');
$node->wait_for_log(qr/dropped the counts of a buffer that no longer exists.*\n.* held a count of 11 in 1 key/, $offset);
pass('DROP: the counts are dropped, and the log tells');

# Dropped when the worker has just passed on to it
make_logged($db, 'boss', 'fourth', q{interval '1h', timeout '1h'});
$gate = begin_with('third', 'DROP in a call');
sql(q{INSERT INTO gates VALUES ('fourth'); SELECT sb_increment('k', 13, 'fourth'), sb_flush_all('fourth')});
$other_gate = close_gate_after('DROP in a call');
open_gate($gate);
wait_for($node, $db, q{SELECT in_flight = 13 FROM sb_stat_buffers WHERE buffer = 'fourth'},
	'DROP in a call: the worker has passed on');
my $dropper = start_session($node, $db, 'DROP FOREIGN TABLE fourth');
wait_for_session($dropper, q{wait_event_type = 'Lock'}, 'DROP in a call: it waits');
$other_gate->quit;
finish_session($dropper, 'DROP in a call: done');
is(given($db, 'fourth'), 13, 'DROP in a call: what was being stored is stored');
sql('DELETE FROM gates');
sql(q{SELECT sb_increment('k', 1, 'third')});
is(sql(q{SELECT sb_drain('third', '60s')}), 't', 'DROP in a call: all goes on');
is(given($db, 'third'), 3 + 1 + 1, 'DROP in a call: and each count is stored once');

# --- the server stops while buffers wait ------------------------------------

# it logs once in ten minutes, and it may just have
$node->restart;
make_logged($db, 'boss', $_, q{interval '10ms', timeout '1h'}) foreach qw(fifth sixth);
$offset = -s $node->logfile;
$gate = begin_with('third', 'stop');
my $started_at = sql('SELECT clock_timestamp()');
sql(q{SELECT sb_increment('k', 17, 'fifth'), sb_increment('k', 19, 'sixth')});
$node->wait_for_log(qr/out of statbuffer worker slots\n.*buffers with due keys wait/, $offset);
my ($pid) = sql(q{SELECT pid FROM sb_stat_buffers WHERE buffer = 'third'});
$node->stop('fast');
eval { $gate->quit };
$node->start;
is(sql(qq{SELECT string_agg(DISTINCT buffer, ' ' ORDER BY buffer) FROM calls WHERE pid = $pid AND at > '$started_at'}),
	'fifth sixth', 'stop: the worker has flushed those that waited, too');
is(sql(q{SELECT bool_and(sb_drain(buffer, '60s')) FROM (VALUES ('third'::regclass), ('fifth'), ('sixth')) b (buffer)}), 't',
	'stop: all are drained after the start');
is(join(' ', map { given($db, $_) } qw(third fifth sixth)), '6 17 19', 'stop: each count is stored once');

$node->stop;
has_not_crashed($node, 'the server never crashed');
done_testing();
