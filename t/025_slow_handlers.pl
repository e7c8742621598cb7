# Handlers that take their time, or never come back: what cuts them off, and
# what goes on meanwhile as if they were not there.
#
# A handler treats a key as the table "manners" says.  Whatever takes time there
# takes an hour, so that who waits for it is seen: statements are cut off after
# a minute, and what is polled for does not come.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(usleep);

my $db = 'postgres';

# What every database needs: the ways to behave.  A handler stores a key, and
# behaves badly then, so that all that it has done has to be undone.
my $definitions = q{
	CREATE TABLE calls (buffer text, key text, counter bigint);
	CREATE TABLE manners (key text PRIMARY KEY, manner text);
	CREATE SEQUENCE begun;
	CREATE SEQUENCE caught;

	CREATE FUNCTION behave(bad text) RETURNS void LANGUAGE plpgsql AS $$
	DECLARE
		manner text := (SELECT m.manner FROM manners m WHERE m.key = bad);
		n int := 0;
	BEGIN
		IF manner = 'sleep' THEN
			PERFORM pg_sleep(3600);
		ELSIF manner = 'wait' THEN
			PERFORM pg_advisory_xact_lock_shared(4713);
		ELSIF manner = 'loop' THEN
			LOOP
				n := (n + 1) % 1000;
			END LOOP;
		ELSIF manner LIKE 'catch%' THEN
			-- once, or three times, or again and again
			LOOP
				BEGIN
					PERFORM pg_sleep(3600);
				EXCEPTION WHEN query_canceled THEN
					PERFORM nextval('caught');
					n := n + 1;
				END;
				EXIT WHEN n = substr(manner, 7)::int;
			END LOOP;
		ELSIF manner = 'cancel' THEN
			RAISE query_canceled USING MESSAGE = 'cancelled by itself';
		ELSIF manner = 'doze' THEN
			PERFORM pg_sleep(0.2);
		END IF;
	END $$;
};

# make_slow(NODE, DATABASE, NAME, FORM, OPTIONS): a buffer whose handler takes
# one key a call, or arrays.
sub make_slow
{
	my ($node, $database, $name, $form, $options) = @_;

	$node->safe_psql($database, $form eq 'arrays' ? qq{
		CREATE FUNCTION ${name}_store(keys text[], counters bigint[]) RETURNS void
		LANGUAGE plpgsql AS \$\$
		BEGIN
			PERFORM nextval('begun');
			INSERT INTO calls SELECT '$name', * FROM unnest(keys, counters);
			PERFORM behave(key) FROM unnest(keys) AS key;
		END \$\$;
	} : qq{
		CREATE FUNCTION ${name}_store(key text, counter bigint) RETURNS void
		LANGUAGE plpgsql AS \$\$
		BEGIN
			PERFORM nextval('begun');
			INSERT INTO calls VALUES ('$name', key, counter);
			PERFORM behave(key);
		END \$\$;
	});
	$node->safe_psql($database, qq{
		CREATE FOREIGN TABLE $name (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler '${name}_store', interval '20ms', $options)});
}

# Runs statements, each a transaction, that must not wait for a handler.
sub in_time
{
	my ($node, $database, @statements) = @_;

	return $node->safe_psql($database, join(";\n", q{SET statement_timeout = '60s'}, @statements));
}

# What is stored for a buffer: keys and sum.
sub is_stored
{
	my ($node, $database, $buffer, $expected, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is($node->safe_psql($database, qq{
			SELECT count(*), count(DISTINCT key), coalesce(sum(counter), 0)
			FROM calls WHERE buffer = '$buffer'}),
		$expected, $what);
}

sub wait_for_sum
{
	my ($node, $database, $buffer, $sum, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($node, $database,
		"SELECT coalesce(sum(counter), 0) = $sum FROM calls WHERE buffer = '$buffer'", $what);
}

# Counts a key for which the handler does not come back, and waits until it is
# at work.
sub get_stuck
{
	my ($node, $database, $buffer, $count, $manner) = @_;

	$manner //= 'sleep';
	$node->safe_psql($database, qq{
		INSERT INTO manners VALUES ('stuck', '$manner')
		ON CONFLICT (key) DO UPDATE SET manner = EXCLUDED.manner;
		SELECT sb_increment('stuck', $count, '$buffer')});
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($node, $database,
		"SELECT in_flight = $count FROM sb_keys('$buffer') WHERE key = 'stuck'",
		"$buffer: the handler is at work");
	wait_for_sleeper($node, $database, $buffer) if $manner eq 'sleep';
}

sub wait_for_sleeper
{
	my ($node, $database, $buffer) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($node, $database, qq{
			SELECT wait_event = 'PgSleep' FROM sb_stat_buffers JOIN pg_stat_activity a USING (pid)
			WHERE buffer = '$buffer'::regclass},
		"$buffer: and asleep");
}

# A database with a handler asleep.
sub make_elsewhere
{
	my ($node, $shutdown) = @_;

	$node->safe_psql('postgres', 'CREATE DATABASE elsewhere');
	$node->safe_psql('elsewhere', "CREATE EXTENSION statbuffer; $definitions");
	make_slow($node, 'elsewhere', 'stuck', 'one key', qq{shutdown '$shutdown'});
	get_stuck($node, 'elsewhere', 'stuck', 1);
}

my $node = new_node('slow', 'statbuffer.max_workers = 12');
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
		is($node->safe_psql($db, "SELECT state, failures, pending, in_flight FROM sb_stat_buffers WHERE buffer = '$name'::regclass"),
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
is($node->safe_psql($db, q{SELECT failures, handler_calls FROM sb_stat_buffers WHERE buffer = 'dozes'::regclass}),
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
			FROM sb_stat_buffers WHERE buffer = 'catches_$times'::regclass}),
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
	($pid, $calls) = split /\|/, $node->safe_psql($db, q{SELECT pid, (SELECT last_value FROM begun) FROM sb_stat_buffers WHERE buffer = 'nudged'::regclass});

	# What is stuck stays so; what comes next finds better manners.
	$node->safe_psql($db, qq{
		DELETE FROM manners;
		INSERT INTO nudged VALUES ('stuck', 1), ('another', 1);
		SELECT $function($pid)});
	wait_for_sum($node, $db, 'nudged', 9, "$function(): the call has ended, and the next one stores all");
	is_stored($node, $db, 'nudged', '2|2|9', "$function(): each key once");
	is($node->safe_psql($db, q{SELECT failures, pending, in_flight, last_error FROM sb_stat_buffers WHERE buffer = 'nudged'::regclass}),
		'0|0|0|', "$function(): that is no failure");
	is($node->safe_psql($db, "SELECT last_value - $calls FROM begun"), '2',
		"$function(): and two calls were made after it");
	is($node->safe_psql($db, "SELECT count(*) FROM pg_stat_activity WHERE pid = $pid"),
		$function eq 'pg_cancel_backend' ? 1 : 0,
		"$function(): the worker is " . ($function eq 'pg_cancel_backend' ? 'still there' : 'gone, and need not wait for "shutdown"'));
}

# While a worker comes up, nothing of the user's runs that could be cancelled.
# Nobody can connect while the session has the lock, so it does it all.
$node->safe_psql($db, q{DELETE FROM manners; TRUNCATE calls; ALTER FOREIGN TABLE nudged OPTIONS (ADD timeout '0')});
my $no_worker = q{SELECT pid IS NULL FROM sb_stat_buffers WHERE buffer = 'nudged'::regclass};
my $offset = -s $node->logfile;
my $locker = $node->background_psql($db);
my $coming_up = q{SELECT pid FROM sb_stat_buffers JOIN pg_locks USING (pid)
	WHERE buffer = 'nudged'::regclass AND relation = 'pg_db_role_setting'::regclass AND NOT granted;};
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

# Increments of the same key, of others and of other buffers don't wait.
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
is(in_time($node, $db, q{SELECT in_flight, pending, state FROM sb_stat_buffers WHERE buffer = 'stuck'::regclass}), '100|250|running',
	'the view does not wait');
is(in_time($node, $db, q{SELECT sb_flush('stuck', 'stuck'), sb_flush_all('stuck')}), '|', 'who asks for a flush does not wait');

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
is($node->safe_psql($db, q{SELECT handler_calls, flushed_keys, in_flight FROM sb_stat_buffers WHERE buffer = 'stuck'::regclass}),
	'1|0|100', 'the handler still sleeps');
$node->safe_psql('postgres', 'ALTER SYSTEM RESET statbuffer.max_workers');
$node->reload;

# --- sb_stop() --------------------------------------------------------------

# It comes back when "shutdown" is over, though the handler doesn't, and what
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
	is($node->safe_psql($db, q{SELECT state, pending, in_flight, failures FROM sb_stat_buffers WHERE buffer = 'stuck'::regclass}),
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
	is($node->safe_psql($db, q{SELECT state, pending + in_flight FROM sb_stat_buffers WHERE buffer = 'stuck'::regclass}),
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
		FROM sb_stat_buffers WHERE buffer = 'stuck'::regclass}),
	'350', 'what it had is stored, or kept');

# To terminate the worker helps against one that never gives in.
$node->safe_psql($db, q{
	UPDATE manners SET manner = 'catch 1000000';
	SELECT sb_start('stuck');
	SELECT sb_increment('stuck', 1, 'stuck')});
wait_for_sleeper($node, $db, 'stuck');
$node->safe_psql($db, q{
	DELETE FROM manners;
	SELECT pg_terminate_backend(pid) FROM sb_stat_buffers WHERE buffer = 'stuck'::regclass});
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
$gate = close_gate($node, $db);
my $begun = $node->safe_psql($db, 'SELECT last_value FROM begun');
$node->safe_psql($db, q{SELECT sb_increment('stuck', 1, 'kept')});
wait_for($node, $db, q{SELECT in_flight = 1 FROM sb_stat_buffers WHERE buffer = 'kept'::regclass}, 'a handler waits');

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
wait_for($node, $db, q{SELECT in_flight = 1 AND pending = 19 FROM sb_stat_buffers WHERE buffer = 'doomed'::regclass}, 'one of twenty calls is under way');
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

# --- the server stops -------------------------------------------------------

# Handlers sleep and run in circles in several buffers, and one doesn't let
# itself be cancelled.  The server stops all the same: after "shutdown", and
# for "shutdown" 0 at once; whatever it says, not later than the setting
# "statbuffer.max_shutdown" allows.  The hour that they want to take is longer
# than pg_ctl waits.
for my $preloaded (0, 1)
{
	for my $shutdown ('1s', '0', '1d')
	{
		for my $mode (qw(fast smart))
		{
			my $how = ($preloaded ? 'preloaded' : 'not preloaded') . ", shutdown $shutdown, $mode";
			my $name = join '_', 'stop', $preloaded, $shutdown, $mode;

			next if $mode eq 'smart' && $shutdown ne '1s';
			$node = new_node($name, 'statbuffer.max_workers = 12',
				"statbuffer.max_shutdown = '" . ($shutdown eq '1d' ? '1s' : '1h') . q{'},
				$preloaded ? q{shared_preload_libraries = 'statbuffer'} : '');
			$node->safe_psql($db, $definitions);
			$node->safe_psql($db, q{
				INSERT INTO manners VALUES ('sleep', 'sleep'), ('loop', 'loop'), ('catch', 'catch 1000000')});
			for my $manner (qw(sleep loop catch))
			{
				make_slow($node, $db, "b_$manner", 'one key', qq{shutdown '$shutdown'});
				$node->safe_psql($db, qq{
					INSERT INTO b_$manner VALUES ('good', 1);
					SELECT sb_drain('b_$manner');
					INSERT INTO b_$manner VALUES ('$manner', 10)});
				wait_for($node, $db, "SELECT in_flight = 10 FROM sb_stat_buffers WHERE buffer = 'b_$manner'::regclass", "$how: a handler is at work ($manner)");
				$node->safe_psql($db, "INSERT INTO b_$manner VALUES ('waits', 100)");
			}

			# Preloaded, the workers are asked to leave before.
			if ($mode eq 'fast')
			{
				make_elsewhere($node, $shutdown);
				in_time($node, $db, 'DROP DATABASE elsewhere WITH (FORCE)');
				pass("$how: DROP DATABASE ... WITH (FORCE), too, does not wait for a handler");
			}

			# Those that are at work have seen it; the next server's behave.
			$node->safe_psql($db, 'DELETE FROM manners');
			local $ENV{PGCTLTIMEOUT} = 60;
			ok($node->stop($mode, fail_ok => 1), "$how: the server stops, whatever handlers do")
			  or $node->stop('immediate');
			$node->start;

			# What was in flight, and what waited behind it, is stored then.
			for my $manner (qw(sleep loop catch))
			{
				increment($node, $db, "b_$manner", 'after', 1000);
				wait_for_sum($node, $db, "b_$manner", 1111, "$how: nothing is lost ($manner)");
				is_stored($node, $db, "b_$manner", '4|4|1111', "$how: and nothing stored twice");
			}
			$node->stop;
		}
	}
}

done_testing();
