# What cuts off a handler that takes too long: handler_timeout, wherever the
# handler is when its time is up, and somebody who cancels or terminates the
# worker.  Only the first is a failure of the key's.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use SlowTest;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(usleep);

my $db = 'postgres';
my $node = new_node('slow', 'statbuffer.max_workers = 12', q{shared_preload_libraries = 'statbuffer'});
$node->safe_psql($db, $definitions);

# --- handler_timeout --------------------------------------------------------

# Where the handler is when its time is up makes no difference; nor does its
# form.  Ten keys in a batch, one of them bad; a failed key's next attempt is
# an hour away, so a single one must do.
my $gate = close_gate($node, $db);
for my $form ('one key', 'arrays')
{
	for my $manner (qw(sleep wait loop))
	{
		my $name = substr($form, 0, 3) . "_$manner";
		my $how = "$form, $manner";

		$node->safe_psql($db, "INSERT INTO manners VALUES ('bad', '$manner') ON CONFLICT (key) DO UPDATE SET manner = EXCLUDED.manner");
		make_slow($node, $db, $name, $form, q{handler_timeout '200ms', backoff '1h'});
		$node->safe_psql($db, "INSERT INTO $name SELECT CASE i WHEN 5 THEN 'bad' ELSE 'good ' || i END, 10 FROM generate_series(1, 10) i");
		wait_for_sum($node, $db, $name, 90, "$how: the other keys of the batch are stored");
		wait_for($node, $db, "SELECT failures > 0 FROM sb_keys('$name') WHERE key = 'bad'",
			"$how: the call that took too long has failed");
		is($node->safe_psql($db, "SELECT key, count, in_flight, failures, last_error, due_at > now() + '50min' FROM sb_keys('$name') WHERE failures > 0"),
			'bad|10|0|1|handler did not return within 200 ms|t', "$how: the key keeps its count, and backs off");
		is_stored($node, $db, $name, '9|9|90', "$how: and nothing of it is stored");
		is($node->safe_psql($db, "SELECT state, failures, pending, in_flight FROM sb_stat_buffers WHERE relid = '$name'::regclass"),
			'failing|1|10|0', "$how: the view tells");

		# What is counted afterwards is stored, and counted for the bad key is kept.
		$node->safe_psql($db, "INSERT INTO $name VALUES ('bad', 1), ('good 1', 5), ('new', 5)");
		wait_for_sum($node, $db, $name, 100, "$how: the buffer goes on");
		is($node->safe_psql($db, "SELECT sb_count('bad', '$name')"), '11', "$how: without the bad key");
		$node->safe_psql($db, "DELETE FROM manners; SELECT sb_flush('bad', '$name')");
		wait_for_sum($node, $db, $name, 111, "$how: when the handler comes back in time, the key is stored");
		is_stored($node, $db, $name, '12|11|111', "$how: each key once for each of its flushes");
		$node->safe_psql($db, "DROP FOREIGN TABLE $name");
	}
}
open_gate($gate);

# The time is that of a call, not of the batch.
make_slow($node, $db, 'dozes', 'one key', q{handler_timeout '1500ms', backoff '1h'});
$node->safe_psql($db, q{
	INSERT INTO manners SELECT 'key ' || i, 'doze' FROM generate_series(1, 10) i;
	INSERT INTO dozes SELECT 'key ' || i, 1 FROM generate_series(1, 10) i});
wait_for_sum($node, $db, 'dozes', 10, 'ten calls, none of which takes long, take long together');
is($node->safe_psql($db, q{SELECT failures, handler_calls FROM sb_stat_buffers WHERE buffer = 'dozes'}),
	'0|10', 'and none is cut off');
$node->safe_psql($db, 'DELETE FROM manners; DROP FOREIGN TABLE dozes');

# A handler may catch the error and go on: what it returns is what counts.  But
# it is reminded.
for my $times (1, 3)
{
	make_slow($node, $db, "catches_$times", 'one key', q{handler_timeout '200ms', backoff '1h'});
	$node->safe_psql($db, qq{
		SELECT setval('caught', 1, false);
		INSERT INTO manners VALUES ('bad', 'catch $times');
		INSERT INTO catches_$times VALUES ('good 1', 1), ('bad', 1), ('good 2', 1)});
	wait_for_sum($node, $db, "catches_$times", 3, "a handler that catches the error $times times, and comes back then, has done its work");
	is($node->safe_psql($db, qq{
			SELECT failures, handler_calls, (SELECT last_value FROM caught)
			FROM sb_stat_buffers WHERE relid = 'catches_$times'::regclass}),
		"0|3|$times", 'that is not a failure');
	$node->safe_psql($db, "DELETE FROM manners; DROP FOREIGN TABLE catches_$times");
}

# One that raises the same error by itself has failed as with any other: not
# for taking too long, and not as if somebody had cancelled it.
for my $options (q{backoff '1h'}, q{backoff '1h', handler_timeout '1min'})
{
	make_slow($node, $db, 'cancels', 'arrays', $options);
	$node->safe_psql($db, q{
		INSERT INTO manners VALUES ('bad', 'cancel');
		INSERT INTO cancels SELECT CASE i WHEN 5 THEN 'bad' ELSE 'good ' || i END, 1 FROM generate_series(1, 10) i});
	wait_for_sum($node, $db, 'cancels', 9, "$options: a handler that raises query_canceled by itself: the other keys are stored");
	wait_for($node, $db, q{SELECT failures > 0 FROM sb_keys('cancels') WHERE key = 'bad'},
		'the one it did so for has failed');
	is($node->safe_psql($db, q{SELECT key, count, failures, last_error FROM sb_keys('cancels') WHERE failures > 0}),
		'bad|1|1|cancelled by itself', 'with its own words');
	$node->safe_psql($db, 'DELETE FROM manners; TRUNCATE calls; DROP FOREIGN TABLE cancels; DROP FUNCTION cancels_store');
}

# --- the worker is cancelled or terminated ----------------------------------

# Somebody who cancels the call is no failure of the key's; it comes again
# soon, however long the back-off of failures is.
make_slow($node, $db, 'nudged', 'one key', q{backoff '1h', shutdown '1d'});
for my $function (qw(pg_cancel_backend pg_terminate_backend))
{
	my ($pid, $calls);

	$node->safe_psql($db, q{TRUNCATE calls; SELECT sb_stat_reset('nudged')});
	get_stuck($node, $db, 'nudged', 7);
	($pid, $calls) = split /\|/, $node->safe_psql($db, q{SELECT pid, (SELECT last_value FROM begun) FROM sb_stat_buffers WHERE buffer = 'nudged'});

	# What is stuck stays so; what comes next finds better manners.
	$node->safe_psql($db, qq{
		DELETE FROM manners;
		INSERT INTO nudged VALUES ('stuck', 1), ('another', 1);
		SELECT $function($pid)});
	wait_for_sum($node, $db, 'nudged', 9, "$function(): the call has ended, and the next one stores all");
	is_stored($node, $db, 'nudged', '2|2|9', "$function(): each key once");
	is($node->safe_psql($db, q{SELECT failures, pending, in_flight, last_error FROM sb_stat_buffers WHERE buffer = 'nudged'}),
		'0|0|0|', "$function(): that is no failure");
	is($node->safe_psql($db, "SELECT last_value - $calls FROM begun"), '2',
		"$function(): and two calls were made after it");
	is($node->safe_psql($db, "SELECT count(*) FROM pg_stat_activity WHERE pid = $pid"),
		$function eq 'pg_cancel_backend' ? 1 : 0,
		"$function(): the worker is " . ($function eq 'pg_cancel_backend' ? 'still there' : 'gone, and need not wait for "shutdown"'));
}

# Nor is it if its time was up before that: a cancel is one, whatever else there
# is.
for my $form ('one key', 'arrays')
{
	make_slow($node, $db, 'twice', $form, q{handler_timeout '500ms', backoff '1h'});
	$node->safe_psql($db, q{
		SELECT setval('caught', 1, false);
		INSERT INTO manners VALUES ('bad', 'twice');
		INSERT INTO twice VALUES ('good', 1), ('bad', 10)});
	wait_for_sum($node, $db, 'twice', 11, "$form: a call whose time was up is cancelled, and comes again");
	is_stored($node, $db, 'twice', '2|2|11', "$form: each key is stored once");
	is($node->safe_psql($db, q{SELECT failures, pending, in_flight, last_error FROM sb_stat_buffers WHERE buffer = 'twice'}),
		'0|0|0|', "$form: that is no failure");
	$node->safe_psql($db, 'DELETE FROM manners; TRUNCATE calls; DROP FOREIGN TABLE twice; DROP FUNCTION twice_store');
}

# While a worker comes up, nothing of the user's runs that could be cancelled.
# Nobody can connect while the session has the lock, so it does it all.
$node->safe_psql($db, q{DELETE FROM manners; TRUNCATE calls; ALTER FOREIGN TABLE nudged OPTIONS (ADD timeout '0')});
my $no_worker = q{SELECT pid IS NULL FROM sb_stat_buffers WHERE buffer = 'nudged'};
my $offset = -s $node->logfile;
my $locker = $node->background_psql($db);
my $coming_up = q{SELECT pid FROM sb_stat_buffers JOIN pg_locks USING (pid)
	WHERE buffer = 'nudged' AND relation = 'pg_db_role_setting'::regclass AND NOT granted;};
$locker->query_safe("INSERT INTO nudged VALUES ('first', 1); SELECT sb_drain('nudged'); $coming_up");
wait_for($node, $db, $no_worker, 'there is no worker');
$locker->query_safe(q{BEGIN; LOCK pg_db_role_setting IN ACCESS EXCLUSIVE MODE; SELECT sb_async_increment('second', 10, 'nudged')});
my $until = time + $PostgreSQL::Test::Utils::timeout_default;
my $new;
usleep(10_000) until ($new = $locker->query_safe($coming_up)) ne '' || time > $until;
like($new, qr/^\d+$/, 'a worker is coming up');
$locker->query_safe("SELECT pg_cancel_backend($new), pg_sleep(0.2)");
is($locker->query_safe($coming_up), $new, 'pg_cancel_backend() while it does: it goes on');
$locker->query_safe('COMMIT');
$locker->quit;
wait_for_sum($node, $db, 'nudged', 11, 'and flushes');
is(lines_in_log($node, qr/ERROR:.*canceling statement/, $offset), 0, 'nothing was cancelled');
$node->safe_psql($db, 'DROP FOREIGN TABLE nudged; TRUNCATE calls');

$node->stop;
done_testing();
