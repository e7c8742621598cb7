# When keys are flushed: never before their interval is over, soon after it,
# at once when that is asked for, and at the pace of the back-off when the
# handler fails.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $node = new_node('timing');
my $db = 'postgres';

# Lateness is told, but a loaded machine is no failure: this many seconds
# only tell late from never.
my $generous = 10;

# --- the interval -----------------------------------------------------------

# Each key's first increment is made in a transaction of its own, between two
# looks at the clock.
$node->safe_psql($db, q{
	CREATE TABLE counted (buffer text, key text, before timestamptz, after timestamptz);
	CREATE PROCEDURE count_keys(buffer text, prefix text, n int, pause float8)
	LANGUAGE plpgsql AS $$
	DECLARE
		before timestamptz;
	BEGIN
		FOR i IN 1 .. n LOOP
			before := clock_timestamp();
			PERFORM sb_increment(prefix || i, 1, buffer::regclass);
			COMMIT;
			INSERT INTO counted VALUES (buffer, prefix || i, before, clock_timestamp());
			COMMIT;
			PERFORM pg_sleep(pause);
		END LOOP;
	END
	$$;
});

# How much later than due the handler was called: the earliest by the look at
# the clock before, the latest by that after.
sub lateness
{
	my ($buffer, $interval) = @_;

	return split /\|/, $node->safe_psql($db, qq{
		SELECT extract(epoch FROM min(at - before) - '$interval'::interval),
			extract(epoch FROM percentile_cont(0.5) WITHIN GROUP (ORDER BY at - after) - '$interval'::interval),
			extract(epoch FROM max(at - after) - '$interval'::interval),
			count(*)
		FROM counted JOIN ${buffer}_calls USING (key)
		WHERE buffer = '$buffer'});
}

for my $case (
	[ 'quick', '100ms', 40, 0.02 ],
	[ 'middling', '700ms', 40, 0.02 ],
	[ 'slow', '2s', 30, 0.1 ])
{
	my ($buffer, $interval, $n, $pause) = @$case;

	make_buffer($node, $db, $buffer, "interval '$interval'");
	$node->safe_psql($db, "CALL count_keys('$buffer', 'k', $n, $pause)");
	wait_for_stored($node, $db, $buffer, $n, "interval $interval: all keys are flushed");

	my ($earliest, $median, $latest, $calls) = lateness($buffer, $interval);
	is($calls, $n, "interval $interval: each key once");
	cmp_ok($earliest, '>=', 0, "interval $interval: none before its time");
	cmp_ok($latest, '<', $generous, "interval $interval: none long after it");
	note "interval $interval: late by " . ms($median) . " (median), " . ms($latest) . " (most)";
}

# A key that was flushed has its interval again, from its next increment on.
$node->safe_psql($db, q{TRUNCATE counted; TRUNCATE middling_calls;
	CALL count_keys('middling', 'k', 20, 0)});
wait_for_stored($node, $db, 'middling', 20, 'second round: all keys are flushed');
my ($earliest, $median, $latest) = lateness('middling', '700ms');
cmp_ok($earliest, '>=', 0, 'second round: none before its time');
note 'second round: late by ' . ms($median) . ' (median), ' . ms($latest) . ' (most)';

# Increments that come after the first one do not put off the flush.
make_buffer($node, $db, 'busy', q{interval '500ms'});
$node->safe_psql($db, q{
	DO $$
	DECLARE
		before timestamptz := clock_timestamp();
	BEGIN
		WHILE (SELECT count(*) FROM busy_calls) < 3 AND clock_timestamp() < before + '3 min' LOOP
			PERFORM sb_increment('k', 1, 'busy');
			COMMIT;
			PERFORM pg_sleep(0.005);
		END LOOP;
		INSERT INTO counted VALUES ('busy', 'k', before, before);
	END
	$$;
});
is($node->safe_psql($db, q{SELECT sb_drain('busy')}), 't', 'drained');
is($node->safe_psql($db, q{
		SELECT (SELECT sum(counter) FROM busy_calls) = s.increments AND s.increments > 3
		FROM sb_stat_buffers s WHERE buffer = 'busy'}),
	't', 'a key that is never left in peace: stored to the last one');
is($node->safe_psql($db, q{
		SELECT bool_and(at >= before + round * interval '500 ms')
		FROM (SELECT at, row_number() OVER (ORDER BY at) AS round FROM busy_calls ORDER BY at LIMIT 3) rounds,
			counted WHERE buffer = 'busy'}),
	't', 'and not more often than its interval');

# A count that is as large as one can be is no exception.
make_buffer($node, $db, 'huge', q{interval '1h'});
increment($node, $db, 'huge', 'k', '2305843009213693952');
is($node->safe_psql($db, q{
		SELECT count, due_at BETWEEN now() + '59 min' AND now() + '1h' FROM sb_keys('huge')}),
	'2305843009213693952|t', 'a large count is due after the interval, too');

# --- flushes that are asked for ---------------------------------------------

make_buffer($node, $db, 'patient', q{interval '1h'});
increment($node, $db, 'patient', $_) for qw(wanted small other);
$node->safe_psql($db, q{SELECT sb_flush('wanted', 'patient')});
wait_for_stored($node, $db, 'patient', 1, 'sb_flush(): flushed early');
is($node->safe_psql($db, 'SELECT key FROM patient_calls'), 'wanted', 'sb_flush(): that key and no other');
is($node->safe_psql($db, q{SELECT count FROM patient WHERE key = 'small'}), '1', 'another key waits for its time');

$node->safe_psql($db, q{SELECT sb_flush_all('patient')});
wait_for($node, $db, 'SELECT count(*) = 3 FROM patient_calls', 'sb_flush_all(): all are flushed');
is($node->safe_psql($db, q{SELECT sum(count) FROM patient}) || 0, '0', 'sb_flush_all(): nothing is left');

increment($node, $db, 'patient', 'wanted');
is($node->safe_psql($db, q{
		SELECT due_at BETWEEN now() + '59 min' AND now() + '1h'
		FROM sb_keys('patient') WHERE key = 'wanted'}),
	't', 'what is counted after it has its own interval again');

# --- jitter -----------------------------------------------------------------

make_buffer($node, $db, 'jittery', q{interval '10min', jitter '5min'});
my $before = $node->safe_psql($db, 'SELECT clock_timestamp()');
$node->safe_psql($db, q{INSERT INTO jittery SELECT 'k' || i FROM generate_series(1, 500) i});
my ($within, $distinct, $low, $high, $from, $to) = split /\|/, $node->safe_psql($db, qq{
	SELECT count(*) FILTER (WHERE due_at BETWEEN timestamptz '$before' + '10 min' AND clock_timestamp() + '15 min'),
		count(DISTINCT due_at),
		count(*) FILTER (WHERE due_at < timestamptz '$before' + '12.5 min'),
		count(*) FILTER (WHERE due_at > timestamptz '$before' + '12.5 min'),
		min(due_at) - timestamptz '$before', max(due_at) - timestamptz '$before'
	FROM sb_keys('jittery')});
is($within, 500, 'jitter: due times are from interval to interval + jitter');
cmp_ok($distinct, '>', 250, 'jitter: they differ');
cmp_ok($low, '>', 100, 'jitter: many are in the first half');
cmp_ok($high, '>', 100, 'jitter: many are in the second half');
note "jitter 5min on 10min: from $from to $to";

make_buffer($node, $db, 'shaky', q{interval '300ms', jitter '400ms'});
$node->safe_psql($db, q{CALL count_keys('shaky', 'k', 40, 0.005)});
wait_for_stored($node, $db, 'shaky', 40, 'jitter: all are flushed');
($earliest, $median, $latest) = lateness('shaky', '300ms');
cmp_ok($earliest, '>=', 0, 'jitter: none before the interval');
cmp_ok($latest, '<', 0.4 + $generous, 'jitter: none long after interval + jitter');

# --- ALTER FOREIGN TABLE takes effect at once -------------------------------

# with a worker that waits for the old time
make_buffer($node, $db, 'altered', q{interval '1h'});
increment($node, $db, 'altered', 'a');
$node->safe_psql($db, q{SELECT sb_flush('a', 'altered')});
wait_for_stored($node, $db, 'altered', 1, 'a worker is there');
increment($node, $db, 'altered', 'b');
$node->safe_psql($db, q{ALTER FOREIGN TABLE altered OPTIONS (SET interval '100ms')});
wait_for_stored($node, $db, 'altered', 2, 'from 1h to 100ms: a key already counted is flushed');

$node->safe_psql($db, q{ALTER FOREIGN TABLE altered OPTIONS (SET interval '20min')});
increment($node, $db, 'altered', 'c');
is($node->safe_psql($db, q{
		SELECT due_at BETWEEN now() + '19 min' AND now() + '20 min' FROM sb_keys('altered') WHERE key = 'c'}),
	't', 'to 20min: the next key has the new interval');
$node->safe_psql($db, q{ALTER FOREIGN TABLE altered OPTIONS (SET interval '3h')});
wait_for($node, $db, q{
		SELECT due_at BETWEEN now() + '2h 59min' AND now() + '3h' FROM sb_keys('altered') WHERE key = 'c'},
	'to 3h: a key already counted is put off');

# with no worker
make_buffer($node, $db, 'asleep', q{interval '1h', timeout '100ms'});
increment($node, $db, 'asleep', 'a');
wait_for($node, $db, q{
		SELECT pid IS NULL AND pending = 1 FROM sb_stat_buffers WHERE buffer = 'asleep'},
	'a buffer whose worker has left, with a key in it');
$node->safe_psql($db, q{ALTER FOREIGN TABLE asleep OPTIONS (SET interval '100ms')});
wait_for_stored($node, $db, 'asleep', 1, 'from 1h to 100ms while the worker is away: the key is flushed');

# --- the back-off -----------------------------------------------------------

# How far off the next attempt is after so many failures: each attempt but the
# first is asked for, so that nobody has to wait for it.
for my $case (
	[ 'backing', '20s', 20, 20, 20, 40, 60, 60 ],
	[ 'long_backing', '2min', 120, 120, 120, 120, 120 ])
{
	my ($buffer, $backoff, @expected) = @$case;

	make_buffer($node, $db, $buffer, "interval '10ms', backoff '$backoff', timeout '1h'");
	$node->safe_psql($db, "INSERT INTO ${buffer}_bad VALUES ('bad')");
	increment($node, $db, $buffer, 'bad');
	for my $i (0 .. $#expected)
	{
		my $n = $i + 1;

		$node->safe_psql($db, "SELECT sb_flush('bad', '$buffer')") if $i > 0;
		wait_for($node, $db, "SELECT failures = $n FROM sb_keys('$buffer')", "backoff $backoff: failure $n");
		is($node->safe_psql($db, qq{
				SELECT 10 * round(extract(epoch FROM due_at - s.last_error_at) / 10)
				FROM sb_keys('$buffer') k, sb_stat_buffers s
				WHERE s.relid = '$buffer'::regclass}),
			$expected[$i], "backoff $backoff: next attempt $expected[$i] s after it");
	}
	is($node->safe_psql($db, "SELECT last_error FROM sb_keys('$buffer')"), 'bad key bad', 'the error is told');

	increment($node, $db, $buffer, 'good', 5);
	wait_for_stored($node, $db, $buffer, 5, 'another key is flushed meanwhile');

	$node->safe_psql($db, "TRUNCATE ${buffer}_bad; SELECT sb_flush('bad', '$buffer')");
	wait_for_stored($node, $db, $buffer, 6, 'the key is flushed when the handler takes it');
	is($node->safe_psql($db, "SELECT failures, last_error FROM sb_keys('$buffer') WHERE key = 'bad'"),
		'0|', 'its failures are forgotten');
}

# The attempts themselves, seen by the messages of a handler that fails.
$node->safe_psql($db, q{
	CREATE FUNCTION fail(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		RAISE LOG 'attempt at %', extract(epoch FROM clock_timestamp());
		RAISE 'no';
	END
	$$;
	CREATE FOREIGN TABLE failing (key text NOT NULL, count bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'fail', interval '10ms', backoff '300ms');
	SELECT sb_increment('k', 1, 'failing');
});
wait_for($node, $db, q{SELECT failures >= 6 FROM sb_keys('failing')}, 'six attempts failed');
my @attempts = slurp_file($node->logfile) =~ /attempt at ([0-9.]+)/g;
my @gaps = map { $attempts[$_ + 1] - $attempts[$_] } 0 .. 4;
my @least = (0.3, 0.3, 0.3, 0.6, 1.2);
for my $i (0 .. 4)
{
	my $n = $i + 1;

	cmp_ok($gaps[$i], '>=', $least[$i], "backoff 300ms: not before its time after failure $n");
	cmp_ok($gaps[$i], '<', $least[$i] + $generous, "backoff 300ms: but then, after failure $n");
}
note 'backoff 300ms: attempts came after ' . join(', ', map { ms($_) } @gaps);

$node->stop;
done_testing();
