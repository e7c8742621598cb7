# A buffer without work for its timeout gives back its worker and its memory,
# and wakes up again: by an increment, or in time for a key that it holds.
# What sleeps, sleeps: without a single wake-up.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes;

my $node = new_node('hibernation', q{shared_preload_libraries = 'statbuffer'});
my $db = 'postgres';

sub stat_buffer
{
	my ($buffer, $columns) = @_;

	return $node->safe_psql($db, "SELECT $columns FROM sb_stat_buffers WHERE relid = '$buffer'::regclass");
}

# --- going to sleep, and waking up ------------------------------------------

make_buffer($node, $db, 'lazy', q{interval '50ms', timeout '300ms'});
is(stat_buffer('lazy', 'state, pid, keys'), 'idle||0', 'a new buffer is idle');
for my $round (1 .. 3)
{
	increment($node, $db, 'lazy', 'k');
	wait_for_stored($node, $db, 'lazy', $round, "round $round: the increment brought a worker up, which flushed");
	wait_for_no_worker($node, "round $round: the worker has left");
	is($node->safe_psql($db, q{SELECT sb_count('k', 'lazy') IS NULL}), 't', "round $round: the key is gone");
	is(stat_buffer('lazy', 'state, pid, keys, pending, in_flight, oldest_due'),
		'idle||0|0|0|', "round $round: nothing is held");
}

# A session that stays remembers where the counter was that it has counted in;
# it must not count there when the counter is gone.
make_buffer($node, $db, 'known', q{interval '50ms', timeout '300ms'});
my $session = $node->background_psql($db);
for my $round (1 .. 3)
{
	$session->query_safe("SELECT sb_increment('k', 1, 'known')") for 1 .. 2;
	wait_for_stored($node, $db, 'known', 2 * $round, "round $round: what one session counts is stored");
	wait_for($node, $db, q{SELECT keys = 0 FROM sb_stat_buffers WHERE buffer = 'known'},
		"round $round: the key is gone");
	increment($node, $db, 'lazy', 'takes its place');
	wait_for_stored($node, $db, 'lazy', 3 + $round, "round $round: another key is where it was, or not");
}
$session->quit;

# Memory for many keys comes back.
wait_for($node, $db, q{SELECT keys = 0 FROM sb_stat_buffers WHERE buffer = 'lazy'}, 'no key is left');
my $empty = stat_buffer('lazy', 'memory');
$node->safe_psql($db, q{
	ALTER FOREIGN TABLE lazy OPTIONS (SET interval '1h', SET timeout '1h');
	INSERT INTO lazy SELECT 'many ' || i FROM generate_series(1, 20000) i;
});
my $full = stat_buffer('lazy', 'memory');
is(stat_buffer('lazy', 'keys'), '20000', 'many keys are held');
$node->safe_psql($db, q{
	ALTER FOREIGN TABLE lazy OPTIONS (SET timeout '300ms');
	SELECT sb_flush_all('lazy');
});
wait_for_stored($node, $db, 'lazy', 20006, 'many keys are flushed');
wait_for($node, $db, q{SELECT keys = 0 AND pid IS NULL FROM sb_stat_buffers WHERE buffer = 'lazy'},
	'they are gone, and the worker too');
cmp_ok(stat_buffer('lazy', 'memory'), '<=', $empty, 'so is their memory');
note "memory: empty $empty, with 20000 keys $full, afterwards " . stat_buffer('lazy', 'memory') . ' bytes';

# Idle keys go while others of their buffer keep its worker at work.
$node->safe_psql($db, q{ALTER FOREIGN TABLE lazy OPTIONS (SET interval '50ms')});
increment($node, $db, 'lazy', 'idle');
$node->safe_psql($db, q{
	DO $$
	BEGIN
		FOR i IN 1 .. 18000 LOOP
			PERFORM sb_increment('busy', 1, 'lazy');
			COMMIT;
			EXIT WHEN sb_count('idle', 'lazy') IS NULL;
			PERFORM pg_sleep(0.01);
		END LOOP;
	END
	$$;
});
is($node->safe_psql($db, q{
		SELECT sb_count('idle', 'lazy') IS NULL, (SELECT sum(counter) FROM lazy_calls WHERE key = 'idle')}),
	't|1', 'an idle key is gone while another one is busy');
wait_for_no_worker($node, 'and then the worker has left');

# --- a key that is due much later -------------------------------------------

# The worker leaves it alone ...
make_buffer($node, $db, 'later', q{interval '12s', timeout '100ms'});
my $before = Time::HiRes::time();
increment($node, $db, 'later', 'k', 7);
wait_for($node, $db, q{SELECT pid IS NULL FROM sb_stat_buffers WHERE buffer = 'later'},
	'a buffer with a key that is due much later gives up its worker');
wait_for_no_worker($node, 'there is no worker at all');
is($node->safe_psql($db, q{SELECT sb_count('k', 'later')}), '7', 'its key is still held');
is(stat_buffer('later', 'state, keys, pending, oldest_due > now()'), 'idle|1|7|t', 'and is told by the view');

# ... and comes back in time, without being asked.
wait_for_stored($node, $db, 'later', 7, 'a worker came back by itself and flushed');
my $late = $node->safe_psql($db, qq{SELECT extract(epoch FROM min(at)) - $before - 12 FROM later_calls});
cmp_ok($late, '>=', 0, 'not before its time');
cmp_ok($late, '<', 10, 'and not long after it');
note 'late, with a worker that had to be started: ' . ms($late) . ' (a psql of that included)';
wait_for_no_worker($node, 'and left again');

# --- idle wake-ups ----------------------------------------------------------

SKIP:
{
	skip 'no /proc to read wake-ups from', 5 unless -r '/proc/self/status';

	# How many times a process has gone to sleep so far.
	my $sleeps = sub {
		my ($pid) = @_;

		return slurp_file("/proc/$pid/status") =~ /^voluntary_ctxt_switches:\s*(\d+)/m ? $1 : -1;
	};

	# A worker whose only key is due in an hour, and who may stay as long.
	make_buffer($node, $db, 'sleepy', q{interval '1h', timeout '1h'});
	increment($node, $db, 'sleepy', 'a');
	$node->safe_psql($db, q{SELECT sb_drain('sleepy')});
	increment($node, $db, 'sleepy', 'b');

	my %pids = (
		launcher => (processes($node, 'statbuffer launcher'))[0],
		worker => stat_buffer('sleepy', 'pid'));
	like($pids{worker}, qr/^\d+$/, 'a worker sleeps');

	# Both have done what they had to do when a second goes by without a
	# wake-up.
	my %before;
	for (1 .. 60)
	{
		%before = map { $_ => $sleeps->($pids{$_}) } keys %pids;
		sleep 1;
		last unless grep { $sleeps->($pids{$_}) != $before{$_} } keys %pids;
	}

	# This is a time to look at, not one to wait for something.
	my $seconds = 10;
	%before = map { $_ => $sleeps->($pids{$_}) } keys %pids;
	sleep $seconds;
	for my $who (sort keys %pids)
	{
		my $wakeups = $sleeps->($pids{$who}) - $before{$who};

		is($wakeups, 0, "the $who does not wake up while it has nothing to do");
		note "the $who woke up $wakeups times in $seconds s";
	}

	# They were not dead, though.
	$node->safe_psql($db, q{SELECT sb_flush('b', 'sleepy')});
	wait_for_stored($node, $db, 'sleepy', 2, 'the worker wakes up when it is asked to');
	is(stat_buffer('sleepy', 'pid'), $pids{worker}, 'the same one');
}

$node->stop;
done_testing();
