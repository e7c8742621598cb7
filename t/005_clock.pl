# The system's clock is set back and forward by a day while the server runs, as
# if by NTP or on a machine that was restored.  Nothing is flushed late or early
# for that, and nothing waits: not with one worker for all buffers, not for a
# handler that fails, is missing or does not come back, and not when the server
# is stopped and started.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(CLOCK_MONOTONIC clock_gettime);

my $db = 'postgres';
my $day = 24 * 3600;

# --- a clock that can be set ------------------------------------------------

my $dir = PostgreSQL::Test::Utils::tempdir();
my $shim = "$dir/clock_shim.so";
chomp(my $cc = qx{pg_config --cc});
plan skip_all => 'there is no C compiler' if system("$cc --version >/dev/null 2>&1") != 0;
system_or_bail("$cc -shared -fPIC -Wall -Werror -DCLOCK_SHIFT='\"$dir/shift\"' -o $shim $FindBin::RealBin/clock_shim.c");

# The clock is so many seconds ahead of the machine's.  The file is replaced as
# a whole, because the server's processes read it all the time.
sub set_clock
{
	my ($shift) = @_;

	open my $file, '>', "$dir/shift.new" or die "could not open $dir/shift.new: $!";
	print $file $shift;
	close $file or die "could not write $dir/shift.new: $!";
	rename "$dir/shift.new", "$dir/shift" or die "could not rename $dir/shift.new: $!";
}

# With that clock, do what starts a server.
sub with_clock
{
	my ($start) = @_;

	local $ENV{LD_PRELOAD} = $shim;

	# of a server that was built with sanitizers: these come after the shim
	local $ENV{ASAN_OPTIONS} = "$ENV{ASAN_OPTIONS}:verify_asan_link_order=0" if $ENV{ASAN_OPTIONS};
	return $start->();
}

set_clock(0);
my $node = with_clock(sub { new_node('clock', 'statbuffer.max_workers = 1') });

my $today = $node->safe_psql($db, 'SELECT clock_timestamp()');
sub shift_seen
{
	return $node->safe_psql($db, "SELECT round(extract(epoch FROM clock_timestamp() - '$today') / $day)");
}
set_clock(-$day);
is(shift_seen(), -1, 'the clock can be set back');
set_clock($day);
is(shift_seen(), 1, 'and forward');
set_clock(0);

# What is measured here is measured by the clock that nobody sets.
sub now
{
	return clock_gettime(CLOCK_MONOTONIC);
}

sub value
{
	my ($columns, $buffer) = @_;

	return $node->safe_psql($db, "SELECT $columns FROM sb_stat_buffers WHERE relid = '$buffer'::regclass");
}

# A statement that takes its time: once it waits, others do what they do.
# Returns what it printed, and how long it took.
sub meanwhile
{
	my ($statement, $others) = @_;
	my ($out, $err) = ('', '');
	my $begin = now();
	my $run = IPC::Run::start(
		[ $node->installed_command('psql'), '-XAtq', '-d', $node->connstr($db), '-c', $statement ],
		'<', \undef, '>', \$out, '2>', \$err,
		IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default));

	$node->poll_query_until($db, q{
		SELECT count(*) = 1 FROM pg_stat_activity
		WHERE query ~ '^SELECT sb_(drain|stop)\(''held' AND wait_event IS NOT NULL AND state = 'active'})
	  or die "$statement does not wait";
	$others->();
	eval { $run->finish; 1 } or $run->kill_kill;
	chomp $out;
	return ($out, $err, now() - $begin);
}

# A handler that waits for somebody, one that sleeps, and one that fails as a
# table says.
$node->safe_psql($db, q{
	CREATE TABLE held_calls (key text, counter bigint);
	CREATE FUNCTION hold(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM pg_advisory_xact_lock_shared(4714);
		INSERT INTO held_calls VALUES (key, counter);
	END
	$$;
	CREATE FOREIGN TABLE held (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'hold', interval '10ms', backoff '10ms', shutdown '2s');

	CREATE FUNCTION doze(key text, counter bigint) RETURNS void LANGUAGE sql AS 'SELECT pg_sleep(3600)';
	CREATE FOREIGN TABLE slow (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'doze', interval '10ms', backoff '1h', shutdown '2s', handler_timeout '2s');

	CREATE TABLE errors (state text);
	CREATE FUNCTION fail(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		RAISE 'failed' USING ERRCODE = (SELECT state FROM errors);
	END
	$$;
	CREATE FOREIGN TABLE noisy (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'fail', interval '10ms', backoff '1h');
});

my $holder;
my $held = 0;

sub hold
{
	my ($what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	$holder = $node->background_psql($db);
	$holder->query_safe('SELECT pg_advisory_lock(4714)');
	increment($node, $db, 'held', 'k');
	$held++;
	wait_for($node, $db, q{SELECT in_flight > 0 FROM sb_stat_buffers WHERE buffer = 'held'}, $what);
}

sub let_go
{
	$holder->query_safe('SELECT pg_advisory_unlock(4714)');
	$holder->quit;
}

# --- one worker for all, and none there when the clock is set ---------------

make_buffer($node, $db, $_, q{interval '100ms', timeout '200ms'}) for qw(one two);
make_buffer($node, $db, 'hourly', q{interval '1h', timeout '200ms'});
make_buffer($node, $db, 'soon', q{interval '7s', timeout '200ms'});
make_buffer($node, $db, 'failing', q{interval '10ms', timeout '200ms', backoff '7s'});
make_buffer($node, $db, 'missing', q{interval '10ms', timeout '200ms', backoff '7s'});

my $round = 0;
for my $case ([ 'set back', 0, -$day ], [ 'set forward', -$day, 0 ])
{
	my ($how, $before, $after) = @$case;

	$round++;
	set_clock($before);
	increment($node, $db, $_, $how) for qw(one two);
	wait_for_stored($node, $db, $_, 2 * $round - 1, "to be $how: $_ is flushed") for qw(one two);
	increment($node, $db, 'hourly', $how);
	$node->safe_psql($db, qq{
		INSERT INTO failing_bad VALUES ('$how');
		ALTER FUNCTION missing_store RENAME TO gone});
	increment($node, $db, $_, $how) for qw(failing missing);
	wait_for($node, $db, qq{
			SELECT count(*) = 2 FROM sb_stat_buffers
			WHERE buffer IN ('failing', 'missing') AND state = 'failing'},
		"to be $how: one handler fails, and one is missing");
	wait_for_no_worker($node, "to be $how: no buffer has a worker");

	my $begin = now();
	increment($node, $db, 'soon', $how);
	set_clock($after);

	increment($node, $db, $_, $how) for qw(one two);
	wait_for_stored($node, $db, $_, 2 * $round, "$how: $_ is flushed") for qw(one two);

	# In an hour, by the clock as it is set.  The worker has a look at it, for
	# another key.
	increment($node, $db, 'hourly', 'asked for');
	$node->safe_psql($db, q{SELECT sb_flush('asked for', 'hourly')});
	wait_for_stored($node, $db, 'hourly', $round, "$how: what is asked for is flushed");
	is($node->safe_psql($db, qq{
			SELECT count, due_at BETWEEN clock_timestamp() + '50min' AND clock_timestamp() + '1h'
			FROM sb_keys('hourly') WHERE key = '$how'}),
		'1|t', "$how: a key that is held for an hour is held for no more and no less");

	wait_for_stored($node, $db, 'soon', $round, "$how: what was counted before is flushed");
	cmp_ok(now() - $begin, '>=', 7, "$how: and not before it is due");

	# What fails is tried again by itself.
	$node->safe_psql($db, q{
		DELETE FROM failing_bad;
		ALTER FUNCTION gone RENAME TO missing_store});
	wait_for_stored($node, $db, 'failing', $round, "$how: a handler that failed is called again");
	wait_for_stored($node, $db, 'missing', $round, "$how: one that was missing is called");
	wait_for_no_worker($node, "$how: idle workers give back their slot");
	is(value('state, keys', 'one'), 'idle|0', "$how: and idle keys their memory");
}

# A worker that cannot connect is tried again.
$node->safe_psql($db, 'CREATE DATABASE other');
$node->safe_psql('other', 'CREATE EXTENSION statbuffer');
make_buffer($node, 'other', 'shut', q{interval '10ms'});
my $session = $node->background_psql('other');
$node->safe_psql($db, 'ALTER DATABASE other ALLOW_CONNECTIONS false');
$session->query_safe(q{SELECT sb_increment('k', 1, 'shut')});
$node->wait_for_log(qr/database "other" is not currently accepting connections/);
set_clock(-$day);
$node->safe_psql($db, 'ALTER DATABASE other ALLOW_CONNECTIONS true');
$session->quit;
wait_for_stored($node, 'other', 'shut', 1, 'set back: a worker that could not connect is started again');

# --- who waits, and for how long --------------------------------------------

$node->safe_psql($db, 'ALTER SYSTEM SET statbuffer.max_workers = 4');
$node->reload;
set_clock(0);
hold('a handler is at work');
my ($out, $err, $took) = meanwhile(q{SELECT sb_drain('held', '2s')}, sub { set_clock(-$day) });
is($out, 'f', 'set back: sb_drain() comes back when its time is up');
cmp_ok($took, '<', 60, 'set back: and not later');
note "sb_drain() with two seconds took $took s";
($out, $err, $took) = meanwhile(
	q{SELECT sb_drain('held', '1h')},
	sub {
		set_clock(0);

		# who waits for a drain looks whether it is his when one is over
		$node->safe_psql($db, qq{SELECT sb_increment('k', 1, 'one'); SELECT sb_drain('one', '$patience')});
		is($node->safe_psql($db, q{SELECT count(*) FROM pg_stat_activity WHERE query ~ '^SELECT sb_drain\(''held' AND state = 'active'}),
			'1', 'set forward: sb_drain() goes on waiting');
		let_go();
	});
is($out, 't', 'set forward: until all is flushed');

hold('a handler is at work');
($out, $err, $took) = meanwhile(q{SELECT sb_stop('held')}, sub { set_clock(-$day) });
like($err, qr/NOTICE:  not everything in buffer "held" could be flushed within 2000 ms/,
	'set back: sb_stop() tells that its time is up');
cmp_ok($took, '<', 60, 'set back: when it is');
note "sb_stop() with two seconds took $took s";
is(value('state, pending', 'held'), 'stopped|1', 'set back: and has cut off the handler');
let_go();
$node->safe_psql($db, q{SELECT sb_start('held')});
wait_for_stored($node, $db, 'held', $held, 'set back: started again, all is flushed');

# The time of a handler.
set_clock(0);
increment($node, $db, 'slow', 'k');
wait_for($node, $db, q{SELECT in_flight > 0 FROM sb_stat_buffers WHERE buffer = 'slow'}, 'a handler sleeps');
set_clock(-$day);
wait_for($node, $db, q{SELECT last_error = 'handler did not return within 2000 ms' FROM sb_keys('slow')},
	'set back: a handler is cut off when its time is up');

$node->safe_psql($db, q{ALTER FOREIGN TABLE held OPTIONS (ADD handler_timeout '1h')});
hold('a handler is at work');
set_clock(0);
for (1 .. 3)
{
	$node->safe_psql($db, q{SELECT sb_increment('k', 1, 'two')});
	wait_for($node, $db, q{SELECT sb_count('k', 'two') IS NULL}, 'set forward: others are flushed meanwhile');
}
is(value('failures, in_flight', 'held'), '0|1', 'set forward: a handler is not cut off before its time is up');
let_go();
wait_for_stored($node, $db, 'held', $held, 'set forward: and stores what it has');

# --- what is told in the log ------------------------------------------------

# How many failures with an SQLSTATE were told, after another attempt.
sub told
{
	my ($state) = @_;
	my $failures = value('failures', 'noisy') // 0;

	$node->safe_psql($db, "DELETE FROM errors; INSERT INTO errors VALUES ('$state')");
	$node->safe_psql($db, q{SELECT sb_increment('k', 1, 'noisy')});
	$node->safe_psql($db, q{SELECT sb_flush('k', 'noisy')});
	$node->poll_query_until($db, "SELECT failures > $failures FROM sb_stat_buffers WHERE buffer = 'noisy'");
	return lines_in_log($node, qr/LOG:  $state: could not flush 1 key of buffer "noisy"/);
}

$node->safe_psql($db, q{ALTER SYSTEM SET log_error_verbosity = 'verbose'});
$node->reload;
is(told('ABC01'), 1, 'a failure is told in the log');
my $begin = now();
set_clock($day);
my $again = told('ABC01');
SKIP:
{
	skip 'the machine was so slow that a minute has passed', 1 if now() - $begin > 50;
	is($again, 1, 'set forward: the same is not told again within a minute');
}
set_clock(0);
my $until = now() + $PostgreSQL::Test::Utils::timeout_default;
1 while told('ABC02') == 0 && now() < $until;
cmp_ok(told('ABC02'), '>', 0, 'set back: another one is');

# --- when the server stops, and starts again --------------------------------

# With a handler that does not come back.
$node->safe_psql($db, q{
	ALTER FOREIGN TABLE slow OPTIONS (SET handler_timeout '0');
	SELECT sb_flush('k', 'slow')});
wait_for($node, $db, q{SELECT in_flight > 0 FROM sb_stat_buffers WHERE buffer = 'slow'}, 'a handler sleeps');
my $offset = -s $node->logfile;
$begin = now();
kill 'INT', $node->{_pid};
$node->wait_for_log(qr/received fast shutdown request/, $offset);
set_clock(-$day);
$node->stop('fast', fail_ok => 1);
ok(!-e $node->data_dir . '/postmaster.pid', 'set back while it stops: the server has stopped');
note 'with two seconds for handlers, that took ' . (now() - $begin) . ' s';

# It is to be due as if the clock had stood still.
sub held_times
{
	my ($buffer) = @_;

	return $node->safe_psql($db, qq{
		SELECT count(*), min(due_at) > clock_timestamp() + '10min', max(due_at) <= clock_timestamp() + '1h'
		FROM sb_keys('$buffer') WHERE count > 0});
}
set_clock(-2 * $day);
with_clock(sub { $node->start });
increment($node, $db, 'one', 'k');
is(held_times('hourly'), '2|t|t', 'set back while it was down: keys are due within their interval');

# What does not fit into memory goes from one file to the next.
make_buffer($node, $db, 'many', q{interval '1h', shutdown '0', backoff '1h'});
$node->safe_psql($db, q{
	DROP FUNCTION many_store;
	INSERT INTO many SELECT i || repeat('x', 200) FROM generate_series(1, 30000) i});
$node->stop;
$node->append_conf('postgresql.conf', "statbuffer.max_memory = '4MB'");
set_clock(-3 * $day);
$offset = -s $node->logfile;
with_clock(sub { $node->start });
$node->psql($db, q{SELECT sb_increment('k', 1, 'one')});
$node->wait_for_log(qr/could not load all counts of the last shutdown yet: out of memory/, $offset);
$node->stop;
$node->append_conf('postgresql.conf', "statbuffer.max_memory = '256MB'");
with_clock(sub { $node->start });
increment($node, $db, 'one', 'k');
is($node->safe_psql($db, q{SELECT count(*), max(due_at) <= clock_timestamp() + '1h' FROM sb_keys('many')}),
	'30000|t', 'set back while it was down: so are keys that were saved twice');

has_not_crashed($node, 'no process crashed');
$node->stop;
done_testing();
