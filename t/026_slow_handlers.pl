# What goes on while handlers sleep as if they were not there: flushes of other
# buffers, increments, looks, drains, DDL; and what does not wait for ever for a
# handler: sb_stop() and DROP.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use SlowTest;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = new_node('slow', 'statbuffer.max_workers = 12');
$node->safe_psql($db, $definitions);

# --- nobody waits -----------------------------------------------------------

# The handler of a buffer sleeps, and so does one in another database.  There is
# one more slot, for all others.
$node->safe_psql('postgres', 'CREATE DATABASE elsewhere');
$node->safe_psql('elsewhere', "CREATE EXTENSION statbuffer; $definitions");
$node->safe_psql('postgres', 'ALTER SYSTEM SET statbuffer.max_workers = 3');
$node->reload;
make_slow($node, $_, 'stuck', 'one key', q{backoff '1h', shutdown '1s'}) for $db, 'elsewhere';
my @others = map { [ $_->[0], "other_$_->[1]", $_->[1] ] } [ $db, 1 ], [ $db, 2 ], [ $db, 3 ], [ $db, 4 ], [ 'elsewhere', 5 ], [ 'elsewhere', 6 ];
for my $other (@others)
{
	make_slow($node, $other->[0], $other->[1], $other->[2] % 2 ? 'arrays' : 'one key', q{timeout '1h'});
}
get_stuck($node, $_, 'stuck', 100) for $db, 'elsewhere';

for my $round (1 .. 3)
{
	$node->safe_psql($_->[0], "INSERT INTO $_->[1] SELECT 'k' || i, $_->[2] FROM generate_series(1, 10) i") for @others;
	wait_for_sum($node, $_->[0], $_->[1], 10 * $round * $_->[2], "round $round: $_->[0].$_->[1] is flushed while two handlers sleep")
	  for @others;
}
is($node->safe_psql($db, q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'statbuffer worker' AND wait_event = 'PgSleep'}),
	'2', 'they do');

# Increments of the same key, of others and of other buffers do not wait.
in_time($node, $db,
	(q{SELECT sb_increment('stuck', 1, 'stuck')}) x 50,
	(q{SELECT sb_async_increment('stuck', 1, 'stuck')}) x 50,
	(q{SELECT sb_increment('new', 1, 'stuck')}) x 50,
	q{INSERT INTO stuck SELECT 'k' || i, 1 FROM generate_series(1, 100) i},
	q{BEGIN; SELECT sb_increment('stuck', 1000, 'stuck'); SAVEPOINT s; SELECT sb_increment('new', 1000, 'stuck'); ROLLBACK});
pass('increments do not wait');

# Nor does who looks.
is(in_time($node, $db, q{SELECT sb_count('stuck', 'stuck'), sb_count('new', 'stuck'), sb_count('none', 'stuck') IS NULL}),
	'200|50|t', 'sb_count() does not wait');
is(in_time($node, $db, q{SELECT count(*), sum(count) FROM stuck}), '102|350', 'SELECT does not wait');
is(in_time($node, $db, q{SELECT count, in_flight FROM sb_keys('stuck') WHERE key = 'stuck'}), '100|100', 'sb_keys() does not wait');
is(in_time($node, $db, q{SELECT in_flight, pending, state FROM sb_stat_buffers WHERE buffer = 'stuck'}), '100|250|running',
	'the view does not wait');
is(in_time($node, $db, q{SELECT sb_flush('stuck', 'stuck'), sb_flush_all('stuck')}), 't|102', 'who asks for a flush does not wait');

# Who waits because he wants to can stop.
is(in_time($node, $db, q{SELECT sb_drain('stuck', '300ms')}), 'f', 'sb_drain() with a timeout returns false');
is(in_time($node, $db, q{SELECT sb_drain('stuck', '0')}), 'f', 'with 0, too');
my ($result, $stdout, $stderr) = $node->psql($db, q{SET statement_timeout = '300ms'; SELECT sb_drain('stuck')});
like($stderr, qr/ERROR:  canceling statement due to statement timeout/, 'sb_drain() without one can be cancelled');
is(in_time($node, $db, q{SELECT sb_drain('other_1', '1min')}), 't', 'sb_drain() of another buffer comes back');

# Other buffers can be altered, stopped, emptied, dropped and made.
in_time($node, $db,
	q{ALTER FOREIGN TABLE other_1 OPTIONS (SET interval '10ms')},
	q{ALTER FOREIGN TABLE other_1 RENAME TO other_one},
	q{ALTER FOREIGN TABLE other_one RENAME TO other_1},
	q{SELECT sb_stop('other_2')},
	q{SELECT sb_start('other_2')},
	q{TRUNCATE other_3},
	q{DROP FOREIGN TABLE other_4},
	q{CREATE FOREIGN TABLE other_4 (key text NOT NULL, count bigint NOT NULL DEFAULT 1) SERVER statbuffer OPTIONS (handler 'other_4_store', interval '10ms')},
	q{SELECT sb_increment('k1', 1, 'other_4')});
wait_for_sum($node, $db, 'other_4', 121, 'other buffers are altered, stopped, emptied and dropped, and work afterwards');

# The database next door is dropped, with its handler asleep; "shutdown" is
# about something else.
in_time($node, 'elsewhere', q{SELECT sb_increment('new', 1, 'stuck')});
in_time($node, $db, 'DROP DATABASE elsewhere WITH (FORCE)');
pass('DROP DATABASE ... WITH (FORCE) does not wait for a handler');
for my $shutdown ('5s', '1d')
{
	make_elsewhere($node, $shutdown);
	in_time($node, $db, 'DROP DATABASE elsewhere WITH (FORCE)');
	pass("whatever \"shutdown\" says: $shutdown");
}

# All that time the first one has slept.
is($node->safe_psql($db, q{SELECT handler_calls, flushed_keys, in_flight FROM sb_stat_buffers WHERE buffer = 'stuck'}),
	'1|0|100', 'the handler still sleeps');
$node->safe_psql('postgres', 'ALTER SYSTEM RESET statbuffer.max_workers');
$node->reload;

# --- sb_stop() --------------------------------------------------------------

# It comes back when "shutdown" is over, though the handler does not, and what
# it had is kept.
for my $shutdown ('1s', '0')
{
	($result, $stdout, $stderr) = $node->psql($db, qq{
		SET statement_timeout = '60s';
		SELECT sb_stop('stuck')});
	is($result, 0, "shutdown $shutdown: sb_stop() comes back");
	$shutdown eq '1s'
	  ? like($stderr, qr/NOTICE:  not everything .* could be flushed/, "shutdown $shutdown: and tells that something is left")
	  : like($stderr, qr/NOTICE:  buffer "stuck" was stopped without a flush\n.*Counts of 350 altogether are left in 102 keys/, "shutdown $shutdown: which has not even tried, and says so");
	is($node->safe_psql($db, q{SELECT state, pending, in_flight, failures FROM sb_stat_buffers WHERE buffer = 'stuck'}),
		'stopped|350|0|0', "shutdown $shutdown: everything is kept, and nothing has failed");
	($result, $stdout, $stderr) = $node->psql($db, q{SELECT sb_increment('stuck', 1, 'stuck')});
	like($stderr, qr/buffer "stuck" is stopped/, "shutdown $shutdown: it is stopped");

	# Started again, the handler sleeps again; the next time it is stopped at once.
	next if $shutdown eq '0';
	is_stored($node, $db, 'stuck', '0|0|0', "shutdown $shutdown: nothing is stored");
	$node->safe_psql($db, q{SELECT sb_start('stuck')});
	wait_for_sleeper($node, $db, 'stuck');
	in_time($node, $db, q{BEGIN}, q{SELECT sb_stop('stuck')}, q{ROLLBACK});
	pass("shutdown $shutdown: sb_stop() in a transaction comes back, too");
	wait_for_sleeper($node, $db, 'stuck');
	is($node->safe_psql($db, q{SELECT state, pending + in_flight FROM sb_stat_buffers WHERE buffer = 'stuck'}),
		'running|350', "shutdown $shutdown: rolled back, it goes on");

	# To alter an option does wait for the handler; so have the worker leave.
	$node->safe_psql($db, q{
		SELECT sb_stop('stuck');
		ALTER FOREIGN TABLE stuck OPTIONS (SET shutdown '0');
		SELECT sb_start('stuck')});
	wait_for_sleeper($node, $db, 'stuck');
}

# A handler that catches the error is told again and again.
$node->safe_psql($db, q{
	UPDATE manners SET manner = 'catch 3';
	SELECT setval('caught', 1, false);
	SELECT sb_start('stuck')});
wait_for_sleeper($node, $db, 'stuck');
in_time($node, $db, q{SELECT sb_stop('stuck')});
pass('sb_stop() comes back when the handler has caught the error three times');
wait_for($node, $db, q{SELECT last_value > 1 FROM caught}, 'which it did');
is($node->safe_psql($db, q{
		SELECT pending + in_flight + (SELECT coalesce(sum(counter), 0) FROM calls WHERE buffer = 'stuck')
		FROM sb_stat_buffers WHERE buffer = 'stuck'}),
	'350', 'what it had is stored, or kept');

# To terminate the worker helps against one that never gives in.
$node->safe_psql($db, q{
	UPDATE manners SET manner = 'catch 1000000';
	SELECT sb_start('stuck');
	SELECT sb_increment('stuck', 1, 'stuck')});
wait_for_sleeper($node, $db, 'stuck');
$node->safe_psql($db, q{
	DELETE FROM manners;
	SELECT pg_terminate_backend(pid) FROM sb_stat_buffers WHERE buffer = 'stuck'});
wait_for_sum($node, $db, 'stuck', 351, 'the worker of one that never gives in can be terminated');
is($node->safe_psql($db, q{SELECT count(DISTINCT key) FROM calls WHERE buffer = 'stuck'}), '102', 'and all is stored, once');

# An sb_stop() that was given up does not cut off handlers afterwards.
make_slow($node, $db, 'kept', 'one key', q{shutdown '0'});
$node->safe_psql($db, q{INSERT INTO manners VALUES ('stuck', 'wait')});
my $counting = $node->background_psql($db);
$counting->query_safe(q{BEGIN; SELECT sb_increment('k', 1, 'kept')});
($result, $stdout, $stderr) = $node->psql($db, q{SET statement_timeout = '1s'; SELECT sb_stop('kept')});
like($stderr, qr/canceling statement/, 'sb_stop() waits for an open increment, and is cancelled');
$counting->query_safe('COMMIT');
$counting->quit;
wait_for_sum($node, $db, 'kept', 1, 'the buffer goes on');
my $gate = close_gate($node, $db);
my $begun = $node->safe_psql($db, 'SELECT last_value FROM begun');
$node->safe_psql($db, q{SELECT sb_increment('stuck', 1, 'kept')});
wait_for($node, $db, q{SELECT in_flight = 1 FROM sb_stat_buffers WHERE buffer = 'kept'}, 'a handler waits');

# This is a time to look at, not one to wait for something.
sleep 1;
open_gate($gate);
wait_for_sum($node, $db, 'kept', 2, 'and is not cut off');
is($node->safe_psql($db, "SELECT last_value - $begun FROM begun"), '1', 'it was called once');

# --- DROP -------------------------------------------------------------------

# It waits for the call that is under way, and for no other though there is
# more to do; and what is counted meanwhile waits for it.
make_slow($node, $db, 'doomed', 'one key', q{batch_size '1'});
$node->safe_psql($db, q{
	DELETE FROM manners;
	INSERT INTO manners SELECT 'k' || i, 'wait' FROM generate_series(1, 20) i});
$gate = close_gate($node, $db);
$node->safe_psql($db, q{INSERT INTO doomed SELECT 'k' || i, 1 FROM generate_series(1, 20) i});
wait_for($node, $db, q{SELECT in_flight = 1 AND pending = 19 FROM sb_stat_buffers WHERE buffer = 'doomed'}, 'one of twenty calls is under way');
my $dropping = $node->background_psql($db);
$dropping->query_until(qr/dropping/, "\\echo dropping\nDROP FOREIGN TABLE doomed;\n");
wait_for($node, $db, q{SELECT count(*) = 1 FROM pg_locks WHERE relation = 'doomed'::regclass AND NOT granted}, 'DROP FOREIGN TABLE waits for it');
open_gate($gate);
$dropping->query_safe('SELECT 1');
$dropping->quit;
is($node->safe_psql($db, q{SELECT to_regclass('doomed') IS NULL}), 't', 'the call is over, and the buffer is gone');
is_stored($node, $db, 'doomed', '1|1|1', 'without any other call');
$node->safe_psql($db, 'DELETE FROM manners');
$node->stop;

done_testing();
