# What becomes of counts and workers when buffers are dropped, alone and with
# what they need, while a handler is in the middle of a call and while there is
# no worker; while another session waits for the lock; in one transaction with
# increments; that the memory of dropped buffers is used again; and that a worker
# which removes one may be terminated.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use DdlTest;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

# --- buffers are dropped ----------------------------------------------------

sub test_drop
{
	my $offset = -s $node->logfile;
	my $gate = make_busy('dropped');

	run_while_busy('DROP FOREIGN TABLE dropped', $gate);
	wait_for_dropped(102, 2, $offset, 'DROP FOREIGN TABLE');
	is(stored($node, $db, 'dropped'), '5', "$how, DROP FOREIGN TABLE: what was being stored is stored");
	wait_for_leaving('dropped');

	# It has no worker, because nothing is due for long.  Preloaded, the
	# statement has one come; otherwise the next worker of the database sees it.
	$offset = -s $node->logfile;
	make_buffer($node, $db, 'resting', q{interval '1h', timeout '100ms'});
	increment($node, $db, 'resting', 'k', 42);
	wait_for_rest('resting');
	sql('DROP FOREIGN TABLE resting');
	if (!$preloaded)
	{
		make_buffer($node, $db, 'next', q{interval '10ms', timeout '100ms'});
		increment($node, $db, 'next', 'k', 1);
	}
	wait_for_dropped(42, 1, $offset, 'DROP FOREIGN TABLE without a worker');

	# A server of the user's own takes its buffers along; ours cannot be dropped.
	make_buffer($node, $db, 'unmoved', q{interval '1h'});
	like(error_of('DROP SERVER statbuffer CASCADE', $how),
		qr/cannot drop server statbuffer because extension statbuffer requires it/, "$how, DROP SERVER of the extension");
	like(error_of('DROP EXTENSION statbuffer', $how),
		qr/cannot drop extension statbuffer because other objects depend on it/, "$how, DROP EXTENSION without CASCADE");
	$offset = -s $node->logfile;
	$gate = make_busy('served');
	sql(q{
		CREATE SERVER another FOREIGN DATA WRAPPER statbuffer;
		CREATE FOREIGN TABLE elsewhere (key text NOT NULL, count bigint NOT NULL)
		SERVER another OPTIONS (handler 'served_store', interval '20ms', timeout '1h');
		SELECT sb_increment('k', 5, 'elsewhere')});
	hold_more('elsewhere');
	run_while_busy('DROP SERVER another CASCADE', $gate);
	wait_for_dropped(102, 2, $offset, 'DROP SERVER CASCADE');
	wait_for_stored($node, $db, 'served', 5 + 107, "$how, DROP SERVER CASCADE: nothing else went with it");
	sql('DROP FOREIGN TABLE served');

	# All goes that a schema has: buffer, handler and where that stores.  What
	# is held there is not due for long: another call at this moment would wait
	# for the table, and the statement for the call.  The worker sees it, at the
	# latest, when it wants to leave.
	$offset = -s $node->logfile;
	sql(q{
		CREATE SCHEMA app;
		CREATE TABLE app.calls (key text, counter bigint);
		CREATE FUNCTION app.store(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
		BEGIN
			INSERT INTO app.calls VALUES (key, counter);
			PERFORM pg_advisory_xact_lock_shared(4713);
		END
		$$;
		CREATE FOREIGN TABLE app.hits (key text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (handler 'app.store', interval '1h', timeout '3s')});
	$gate = close_gate($node, $db);
	increment($node, $db, 'app.hits', 'k', 5);
	sql(q{SELECT sb_flush_all('app.hits')});
	hold_more('app.hits');
	run_while_busy('DROP SCHEMA app CASCADE', $gate);
	wait_for_dropped(102, 2, $offset, 'DROP SCHEMA CASCADE');
	wait_for_leaving('hits');
	return;
}

# --- while another session waits for the dropped buffer's lock ----------------

# That session has the lock when the worker looks, and it has it for a while.
# So the worker must look again, though no one asks it to.  Only a session with
# the library tells the worker of the DROP.
sub test_drop_while_locked
{
	make_buffer($node, $db, 'wanted', q{interval '1h', timeout '1h'});
	sql('CREATE TABLE locked ()');
	increment($node, $db, 'wanted', 'k', 1);
	sql(q{SELECT sb_drain('wanted')});
	wait_for($node, $db, q{SELECT pid IS NOT NULL FROM sb_stat_buffers WHERE buffer = 'wanted'},
		"$how, DROP of what others wait for: it has a worker");
	my $buffers = sql('SELECT buffers FROM sb_stat_memory');

	my $gate = close_gate($node, $db);
	my $reader = start_session($node, $db,
		'PREPARE p AS SELECT FROM wanted, locked',
		'SELECT pg_advisory_xact_lock_shared(4713)',
		'EXECUTE p');
	wait_at_gate($node, $db, "$how, DROP of what others wait for: another session has a plan");
	my $dropper = $node->background_psql($db);
	my $locker = $node->background_psql($db);
	$dropper->query_safe(q{LOAD 'statbuffer'; BEGIN; DROP FOREIGN TABLE wanted});
	$locker->query_safe('BEGIN; LOCK locked');
	open_gate($gate);
	wait_for_session($reader, q{l.mode = 'AccessShareLock'}, "$how, DROP of what others wait for: it waits");
	$dropper->query_safe('COMMIT');
	wait_for_session($reader, q{l.relation = 'locked'::regclass}, "$how, DROP of what others wait for: it has the lock");
	is(sql('SELECT buffers FROM sb_stat_memory'), $buffers, "$how, DROP of what others wait for: it is still there");
	$locker->query_safe('COMMIT');
	$_->quit foreach $dropper, $locker;
	$reader->{run}->finish;
	like($reader->{err}, qr/relation "wanted" does not exist/, "$how, DROP of what others wait for: the lock is free");
	wait_for($node, $db, "SELECT buffers < $buffers FROM sb_stat_memory", "$how, DROP of what others wait for: it is freed");
	sql('DROP TABLE locked');
	return;
}

# --- in one transaction with increments -------------------------------------

sub test_drop_in_transaction
{
	my $offset = -s $node->logfile;

	for my $case (
		[ 'DROP after increments', q{
			SELECT sb_increment('k', 5, 'brief');
			DROP FOREIGN TABLE brief}, undef ],
		[ 'DROP after increments, rolled back', q{
			SELECT sb_increment('k', 5, 'brief');
			SAVEPOINT s;
			DROP FOREIGN TABLE brief;
			ROLLBACK TO s;
			SELECT sb_increment('k', 2, 'brief')}, 7 ],
		[ 'DROP and increments, rolled back', q{
			SAVEPOINT s;
			SELECT sb_increment('k', 5, 'brief');
			DROP FOREIGN TABLE brief;
			ROLLBACK TO s}, 0 ],
		[ 'DROP after increments of another one', q{
			SELECT sb_increment('k', 5, 'brief'), sb_increment('k', 1000, 'other');
			DROP FOREIGN TABLE other}, 5 ],
		[ 'DROP and CREATE of the same name', q{
			SELECT sb_increment('k', 5, 'brief');
			DROP FOREIGN TABLE brief;
			CREATE FOREIGN TABLE brief (key text NOT NULL, count bigint NOT NULL)
			SERVER statbuffer OPTIONS (handler 'brief_store', interval '1h');
			SELECT sb_increment('k', 9, 'brief')}, 9 ],
		[ 'RENAME of two into each other', q{
			SELECT sb_increment('k', 5, 'brief'), sb_increment('k', 1000, 'other');
			ALTER FOREIGN TABLE brief RENAME TO swap;
			ALTER FOREIGN TABLE other RENAME TO brief;
			ALTER FOREIGN TABLE swap RENAME TO other;
			SELECT sb_increment('k', 3, 'brief')}, 1003 ])
	{
		my ($what, $statements, $expected) = @$case;

		make_buffer($node, $db, 'brief', q{interval '1h'});
		sql(qq{
			CREATE FOREIGN TABLE other (key text NOT NULL, count bigint NOT NULL)
			SERVER statbuffer OPTIONS (handler 'brief_store', interval '1h');
			BEGIN; $statements; COMMIT});
		if (defined $expected)
		{
			is(sql(q{SELECT coalesce(sb_count('k', 'brief'), 0)}), $expected, "$how, $what: counted");
			is(sql(q{SELECT sb_drain('brief')}), 't', "$how, $what: drained");
			is(stored($node, $db, 'brief'), $expected, "$how, $what: stored");
		}
		else
		{
			is(stored($node, $db, 'brief'), 0, "$how, $what: nothing is stored");
		}
		sql(q{
			DROP FOREIGN TABLE IF EXISTS brief, other;
			DROP TABLE brief_calls, brief_bad;
			DROP FUNCTION brief_store});
	}

	# What was counted outside of the transaction that made the buffer, has no
	# buffer when that is rolled back.  That can be done again and again, so the
	# log does not say so.
	my $before = sql('SELECT buffers FROM sb_stat_memory');
	$offset = -s $node->logfile;
	my ($never) = sql(q{
		BEGIN;
		CREATE FOREIGN TABLE never (key text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (interval '10ms', timeout '100ms');
		SELECT sb_async_increment('k', 11, 'never');
		SELECT 'OID ' || 'never'::regclass::oid;
		ROLLBACK}) =~ /OID (\d+)/;
	wait_for($node, $db, "SELECT buffers <= $before FROM sb_stat_memory", "$how, CREATE, an async increment, ROLLBACK: it is freed");
	is(lines_in_log($node, "Relation $never of", $offset), 0, "$how, CREATE, an async increment, ROLLBACK: without a word");
	return;
}

test_with_servers(\&test_drop, \&test_drop_while_locked, \&test_drop_in_transaction);

# --- the memory of what is dropped ------------------------------------------

$node = new_node('memory', 'statbuffer.max_memory = 64MB');

# Ten buffers' keys would not fit in memory together, so one's memory is free
# when its worker has seen that it is gone.
sql(q{
CREATE FUNCTION gone_handler(k text, n bigint) RETURNS void
LANGUAGE sql AS '';
});
my $log_start = -s $node->logfile;
my $filled = 0;
foreach my $round (1 .. 10)
{
	sql(q{
CREATE FOREIGN TABLE gone (k text NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'gone_handler', interval '1h', timeout '1h');
SELECT sb_start('gone')});
	$node->poll_query_until($db,
		"SELECT pid IS NOT NULL FROM sb_stat_buffers WHERE buffer = 'gone'") or last;
	sql("INSERT INTO gone SELECT repeat('x', 1000) || k, 1 FROM generate_series(1, 20000) AS k");
	$filled += sql(
		"SELECT memory FROM sb_stat_buffers WHERE buffer = 'gone'");
	# the session has to have loaded the module for the worker to be told at once
	sql("LOAD 'statbuffer'; DROP FOREIGN TABLE gone");
	$node->poll_query_until($db,
		"SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'statbuffer worker' AND query LIKE 'gone%'",
		'0')
	  or last;
	$node->poll_query_until($db,
		"SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'statbuffer worker'",
		'0')
	  or last;
	pass("buffer $round was dropped with its counts, and its worker left");
}
cmp_ok($filled, '>', 3 * 64 * 1024 * 1024,
	'the memory of dropped buffers is used again');
unlike(slurp_file($node->logfile, $log_start),
	qr/ERROR|FATAL|PANIC/, 'dropping a buffer is no error');

# --- dropped without notice, where there are many ----------------------------

# With more than a hundred buffers not every worker that starts looks for those
# that are gone.  But one does, before long.
sql(q{
DO $$
BEGIN
	FOR i IN 1 .. 130 LOOP
		EXECUTE format($f$CREATE FOREIGN TABLE many_%s (k text NOT NULL, n bigint NOT NULL)
			SERVER statbuffer OPTIONS (handler 'gone_handler', interval '1h', timeout '100ms')$f$, i);
		PERFORM sb_increment('k', i, 'many_' || i);
	END LOOP;
END
$$;
CREATE FOREIGN TABLE brisk (k text NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'gone_handler', interval '10ms', timeout '10ms')});
wait_for_no_worker($node, 'many buffers hold counts, and none has a worker');
is(sql('SELECT count(*) FROM sb_stat_memory, sb_stat_buffers WHERE pending > 0'), '130', 'they are there');
my $buffers = sql('SELECT buffers FROM sb_stat_memory');

foreach my $round (1, 2)
{
	my $offset = -s $node->logfile;
	sql("DROP FOREIGN TABLE many_$round, many_1$round");
	wait_for($node, $db, "WITH woken AS MATERIALIZED (SELECT sb_increment('k', 1, 'brisk') AS done) "
		. "SELECT buffers <= $buffers - 2 * $round + 1 FROM woken, sb_stat_memory",
		"round $round: two of many are dropped without notice, and freed");
	is(lines_in_log($node, qr/dropped the counts of a buffer that no longer exists/, $offset), 2,
		"round $round: and the log tells");
}

# --- dropped with a great many keys -------------------------------------------

# A buffer is removed step by step.  When the worker is terminated on the way, as
# it also would if its slot were wanted, the next one goes on.  Nobody starts it
# before we have looked.
my $great = 600_000;

sub drop_halfway
{
	my $launcher = sql(q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'statbuffer launcher'});

	sql(q{
		CREATE FOREIGN TABLE great (k int, n bigint NOT NULL)
		SERVER statbuffer OPTIONS (handler 'great_handler', interval '1h', timeout '1h');
		SELECT sb_start('great');
	});
	wait_for($node, $db, q{SELECT pid IS NOT NULL FROM sb_stat_buffers WHERE buffer = 'great'},
		'a buffer has a worker');
	sql("INSERT INTO great SELECT k, 2 FROM generate_series(1, $great) k");
	kill 'STOP', $launcher or die "could not stop the launcher: $!";
	my $worker = worker_of($node, $db, 'great');
	my $terminator = start_session($node, $db, qq{
		DO \$\$
		DECLARE
			held bigint := keys FROM sb_stat_memory;
		BEGIN
			WHILE (SELECT keys = held FROM sb_stat_memory) LOOP
				IF clock_timestamp() > statement_timestamp() + interval '3 minutes' THEN
					RAISE 'no key has gone';
				END IF;
			END LOOP;
			PERFORM pg_terminate_backend($worker);
		END \$\$});
	wait_for_session($terminator, 'true', 'somebody looks on');
	sql(q{LOAD 'statbuffer'; DROP FOREIGN TABLE great});
	finish_session($terminator, 'that it gets less is seen');
	wait_for($node, $db, qq{SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $worker}, 'its worker is terminated while it removes the buffer');
	my $left = sql('SELECT keys FROM sb_stat_memory');
	cmp_ok($left, '>', 0, 'keys are left');
	cmp_ok($left, '<', $great, 'but not all');
	return $launcher;
}

my $lost = qr/dropped the counts of a buffer that no longer exists/;
sql(q{CREATE FUNCTION great_handler(k int, n bigint) RETURNS void LANGUAGE sql AS ''});
sql('DROP FOREIGN TABLE brisk');
sql(qq{DO \$\$ BEGIN FOR i IN 1 .. 130 LOOP EXECUTE 'DROP FOREIGN TABLE IF EXISTS many_' || i; END LOOP; END \$\$});
sql(q{
	CREATE FOREIGN TABLE sweeper (k text NOT NULL, n bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'gone_handler', interval '0', timeout '10ms')});
wait_for($node, $db, q{WITH woken AS MATERIALIZED (SELECT sb_increment('k', 1, 'sweeper') AS done) SELECT keys <= 1 FROM woken, sb_stat_memory},
	'all others are gone');
wait_for($node, $db, q{SELECT keys = 0 FROM sb_stat_memory}, 'all of them');

# preloaded: the worker is to stay while nothing is due
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'statbuffer'");
$node->restart;
my $offset = -s $node->logfile;
kill 'CONT', drop_halfway();
wait_for($node, $db, 'SELECT keys = 0 FROM sb_stat_memory', 'another worker frees the rest');
is(lines_in_log($node, $lost, $offset), 1, 'what is lost is told once');
is(lines_in_log($node, qr/held counts of @{[ 2 * $great ]} altogether in $great keys/, $offset), 1, 'all of it');

# When the server stops then, what is left is not saved.
$offset = -s $node->logfile;
my $launcher = drop_halfway();
PostgreSQL::Test::Utils::system_or_bail('pg_ctl', '-D', $node->data_dir, '-m', 'fast', '-W', 'stop');
kill 'CONT', $launcher;
$node->stop('fast');
$node->append_conf('postgresql.conf', "shared_preload_libraries = ''");
$node->start;
is(sql('SELECT keys FROM sb_stat_memory'), 0, 'nothing is there after a restart');
is(lines_in_log($node, $lost, $offset), 1, 'what is lost is told once');
is(lines_in_log($node, 'saved counts', $offset), 0, 'and was not saved');

# One that starts for another buffer leaves it to a worker of its own.
sql(q{
	CREATE FOREIGN TABLE great (k int, n bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'great_handler', interval '1h', timeout '10ms');
	INSERT INTO great SELECT k, 2 FROM generate_series(1, 20000) k});
wait_for_no_worker($node, 'a buffer holds counts, and has no worker');
$offset = -s $node->logfile;
sql('DROP FOREIGN TABLE great');
wait_for($node, $db, q{WITH woken AS MATERIALIZED (SELECT sb_increment('k', 1, 'sweeper') AS done) SELECT keys <= 1 FROM woken, sb_stat_memory},
	'it is dropped without notice, and freed');
is(lines_in_log($node, $lost, $offset), 1, 'and the log tells');

$node->stop('fast');
has_not_crashed($node, 'the server never crashed');

done_testing();
