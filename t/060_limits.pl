# What is bounded: memory, by the setting and by the system; and what is not:
# buffers, keys of a transaction.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(usleep);
use WasteTest;

my $db = 'postgres';
my $MB = 1024 * 1024;

# Dynamic shared memory in files, so that it can be seen how much there is.
my $node = new_node('main', 'dynamic_shared_memory_type = mmap');

# The server itself takes about one MB, and since version 17 one more for its
# registry of named segments.
sub memory
{
	my $sum = -($node->pg_version < 17 ? 1.2 : 2.2) * $MB;

	$sum += -s $_ // 0 foreach glob $node->data_dir . '/pg_dynshmem/*';
	return $sum;
}

# --- memory -----------------------------------------------------------------

# Keys that are not due for an hour, many times more of them than there is
# memory for, at a pace that a worker can follow: none is refused, because
# they are flushed early.
$node->append_conf('postgresql.conf', "statbuffer.max_memory = '8MB'");
$node->reload;
make_summing_buffer($node, 'early', q{interval '1h', timeout '100ms', batch_size '5000'});
my $offset = -s $node->logfile;
foreach my $i (1 .. 150)
{
	$node->safe_psql($db, "INSERT INTO early SELECT '$i ' || g FROM generate_series(1, 2000) g");
	$node->poll_query_until($db, 'SELECT sum(memory) <= 5 * 1024 * 1024 + 30000 FROM sb_stat_buffers')
	  or die 'memory does not get free';
}
is(lines_in_log($node, 'out of memory', $offset), 0, 'keys are flushed before they are due when memory gets short');
cmp_ok((split /\|/, stored_keys($node, 'early'))[0], '>', 200_000, 'many of them');
cmp_ok(memory(), '<=', 8 * $MB, 'memory is bounded');
is($node->safe_psql($db, "SELECT sb_drain('early', '$patience')"), 't', 'the rest is drained');
is(stored_keys($node, 'early'), '300000|300000', 'each key was stored once');

# When they cannot be flushed, there is an end: new keys are errors, and the
# transaction is as if it had not been; those that are held can be counted.
make_summing_buffer($node, 'stuck', q{interval '1h', timeout '100ms', backoff '100ms'});
$node->safe_psql($db, q{INSERT INTO stuck_bad VALUES ('not now')});
$node->safe_psql($db, q{INSERT INTO stuck SELECT 'held ' || g FROM generate_series(1, 10000) g});
my ($status, $stdout, $stderr) = $node->psql($db, q{
	\set VERBOSITY verbose
	BEGIN;
	SELECT sb_increment('held 1', 1000000, 'stuck');
	INSERT INTO stuck SELECT 'new ' || g FROM generate_series(1, 200000) g;
	COMMIT});
like($stderr, qr/ERROR:  53200: out of memory for statbuffer keys\nDETAIL:  All memory that "statbuffer.max_memory" allows is in use.\nHINT:  You might need to increase/,
	'at the bound new keys are an error');
is($node->safe_psql($db, q{SELECT count(*), sum(count) FROM stuck}), '10000|10000',
	'nothing of the transaction has been counted');
cmp_ok(memory(), '<=', 8 * $MB, 'memory is bounded');

# What it had made for nothing is given back.
wait_for($node, $db, q{SELECT keys = 10000 FROM sb_stat_buffers WHERE buffer = 'stuck'},
	'its keys are freed');

# Fill it up to the last key.
my $held = 10000;
foreach my $size (10000, 1000, 100, 10, 1)
{
	while (($node->psql($db, "INSERT INTO stuck SELECT 'more ' || g FROM generate_series($held + 1, $held + $size) g"))[0] == 0)
	{
		$held += $size;
	}
}
($status, $stdout, $stderr) = $node->psql($db, q{SELECT sb_async_increment('one more', 1, 'stuck')});
like($stderr, qr/ERROR:  out of memory for statbuffer keys/, 'an asynchronous increment of a new key is an error, too');
$node->safe_psql($db, q{INSERT INTO stuck SELECT 'held ' || g FROM generate_series(1, 10000) g});
$node->safe_psql($db, q{SELECT sb_async_increment('held 1', 1, 'stuck')});
is($node->safe_psql($db, q{SELECT count(*), sum(count) FROM stuck}), "$held|" . ($held + 10001),
	'at the bound keys that are held are counted');
$node->safe_psql($db, q{SELECT sb_flush('held ' || g, 'stuck') FROM generate_series(1, 10000) g});

# And when the handler works again, it all gets free.
$node->safe_psql($db, 'TRUNCATE stuck_bad');
is($node->safe_psql($db, "SELECT sb_drain('stuck', '$patience')"), 't', 'flushed at last');
is(stored_keys($node, 'stuck'), "$held|" . ($held + 10001), 'all of it');
wait_for($node, $db, q{SELECT sum(keys) = 0 FROM sb_stat_buffers}, 'the keys are freed');

# Processes let go of a segment when they next look at shared memory.
wait_for_no_worker($node, 'there is nothing to do');
for (my $i = 0; $i < 10 * $PostgreSQL::Test::Utils::timeout_default && memory() > 4.5 * $MB; $i++)
{
	usleep(100_000);
}
cmp_ok(memory(), '<=', 4.5 * $MB, 'and memory is given back to the system');
note 'memory that stays: ' . memory();
$node->safe_psql($db, qq{SELECT sb_increment('and', 1, 'stuck'), sb_drain('stuck', '$patience')});
$node->safe_psql($db, q{INSERT INTO stuck SELECT 'again ' || g FROM generate_series(1, 10000) g});
is($node->safe_psql($db, "SELECT sb_drain('stuck', '$patience')"), 't', 'it can be filled again');

# A bound that is lowered below what is held: the same.
$node->safe_psql($db, q{INSERT INTO stuck_bad VALUES ('not now')});
$node->safe_psql($db, q{INSERT INTO stuck SELECT 'low ' || g FROM generate_series(1, 50000) g});
$node->append_conf('postgresql.conf', "statbuffer.max_memory = '4MB'");
$node->reload;
wait_for($node, $db, q{SELECT current_setting('statbuffer.max_memory') = '4MB'}, 'the bound is lowered');
wait_for($node, $db, q{SELECT keys > 30000 FROM sb_stat_buffers WHERE buffer = 'stuck'}, 'more is held');
($status, $stdout, $stderr) = $node->psql($db, q{SELECT sb_increment('new', 1, 'stuck')});
like($stderr, qr/ERROR:  out of memory for statbuffer keys/, 'new keys are an error then');
$node->safe_psql($db, q{INSERT INTO stuck SELECT 'low ' || g FROM generate_series(1, 30000) g});
$node->safe_psql($db, 'TRUNCATE stuck_bad');
is($node->safe_psql($db, "SELECT sb_drain('stuck', '$patience')"), 't', 'what is held is flushed');

# --- a transaction of a million keys ----------------------------------------

$node->append_conf('postgresql.conf', "statbuffer.max_memory = '256MB'");
$node->reload;
make_summing_buffer($node, 'million', q{interval '1h', batch_size '20000'});
$node->safe_psql($db, q{
	BEGIN;
	INSERT INTO million SELECT 'key ' || g, g FROM generate_series(1, 1000000) g;
	ROLLBACK});

# Memory was out a moment ago, so the call may have tried to make them.
wait_for($node, $db, q{SELECT keys = 0 FROM sb_stat_buffers WHERE buffer = 'million'},
	'a million keys rolled back leave nothing');
$node->safe_psql($db, q{
	BEGIN;
	INSERT INTO million SELECT 'key ' || g, g FROM generate_series(1, 1000000) g;
	SAVEPOINT s;
	INSERT INTO million SELECT 'key ' || g, 1000 FROM generate_series(500001, 1500000) g;
	ROLLBACK TO s;
	INSERT INTO million SELECT 'key ' || g, -g FROM generate_series(1, 500000) g;
	COMMIT});
is($node->safe_psql($db, q{SELECT count(*), sum(count) FROM million WHERE count <> 0}), '500000|375000250000',
	'a million keys committed');
is($node->safe_psql($db, "SELECT sb_drain('million', '$patience')"), 't', 'are drained');
is(stored_keys($node, 'million'), '500000|375000250000', 'those that do not add up to nothing are stored');
$node->safe_psql($db, q{DROP FOREIGN TABLE million});

# --- a thousand buffers -----------------------------------------------------

$node->safe_psql($db, q{
	CREATE TABLE thousand_stored (key int, counter bigint);
	CREATE FUNCTION thousand_store(key int, counter bigint) RETURNS void
	LANGUAGE sql AS 'INSERT INTO thousand_stored VALUES (key, counter)';
	DO $$
	BEGIN
		FOR i IN 1 .. 1000 LOOP
			EXECUTE format($f$CREATE FOREIGN TABLE b%s (key int, count bigint)
				SERVER statbuffer OPTIONS (handler 'thousand_store', interval '200ms', timeout '200ms')$f$, i);
		END LOOP;
	END $$});
foreach my $round (1 .. 2)
{
	$node->safe_psql($db, q{
		DO $$
		BEGIN
			FOR i IN 1 .. 1000 LOOP
				PERFORM sb_increment(i, 1, format('b%s', i)::regclass);
			END LOOP;
		END $$});
	wait_for($node, $db, "SELECT count(*) = 1000 * $round AND count(DISTINCT key) = 1000 AND sum(counter) = 1000 * $round FROM thousand_stored",
		"a thousand buffers are flushed ($round)");
	$node->restart if $round == 1;
}
wait_for($node, $db, q{SELECT count(*) = 1000 AND sum(keys) = 0 AND sum(pending) = 0 FROM sb_stat_buffers WHERE buffer ~ '^b\d'},
	'and idle');
$node->safe_psql($db, q{DO $$ BEGIN FOR i IN 1 .. 1000 LOOP EXECUTE format('DROP FOREIGN TABLE b%s', i); COMMIT; END LOOP; END $$});
$node->stop;

# --- as much as a bigint can have --------------------------------------------

# What one transaction adds beyond 2^40 leaves room for all smaller ones.  Only
# with millions of these, while nothing can be flushed, is the range used up.
# Then it is an error, for new ones, and nothing wraps.
$node->start;
make_summing_buffer($node, 'most', q{interval '1h', timeout '1h', backoff '1h'});
$node->safe_psql($db, q{INSERT INTO most_bad VALUES ('x'); SELECT sb_increment('k', 1, 'most')});
is($node->safe_psql($db, q{SELECT sb_drain('most', '1s')}), 'f', 'what is counted stays');
$node->safe_psql($db, q{SELECT sb_increment('k', 2305843009213693951, 'most')});
my $moderate = 1099511627776;
my $room = '9223372036854775807::numeric - 2305843009213693952';
is($node->safe_psql($db, qq{SELECT count(sb_async_increment('k', $moderate, 'most'))
		FROM generate_series(1, (trunc(($room) / $moderate) - 10)::int)}),
	int(6291455 - 10), 'six million increments of 2^40');
my ($ret, undef, $err) = $node->psql($db, qq{SELECT sb_async_increment('k', $moderate, 'most') FROM generate_series(1, 1000)});
like($err, qr/ERROR:  count out of range for type bigint\nHINT/, 'until it is full, without a word of what the key has');
($ret, undef, $err) = $node->psql($db, qq{SELECT sb_increment('k', $moderate, 'most')});
like($err, qr/ERROR:  count out of range for type bigint/, 'also for what is part of a transaction');
is($node->safe_psql($db, q{SELECT sb_count('k', 'most') BETWEEN 9223372036854775807 - 200::bigint * 1099511627776 AND 9223372036854775807}),
	't', 'near the end');
$node->safe_psql($db, qq{SELECT sb_increment('k', -$moderate, 'most')});
my $full = $node->safe_psql($db, q{SELECT sb_count('k', 'most')});
$node->safe_psql($db, q{DELETE FROM most_bad; SELECT sb_flush('k', 'most')});
is($node->safe_psql($db, qq{SELECT sb_drain('most', '$patience')}), 't', 'it can be stored');
is(stored_keys($node, 'most'), "1|$full", 'to the last one');
$node->stop;

# --- the system has less memory than the setting allows ----------------------

$node = new_small_node();
make_summing_buffer($node, 'hits', q{interval '1h', timeout '100ms', backoff '100ms'});
$node->safe_psql($db, q{INSERT INTO hits_bad VALUES ('not now')});
$node->safe_psql($db, q{INSERT INTO hits SELECT 'held ' || g FROM generate_series(1, 1000) g});
($status, $stdout, $stderr) = $node->psql($db, q{
	INSERT INTO hits SELECT 'new ' || g FROM generate_series(1, 500000) g;
	SELECT count(*), sum(count) FROM hits;
	INSERT INTO hits SELECT 'held ' || g FROM generate_series(1, 1000) g;
	SELECT count(*), sum(count) FROM hits}, on_error_stop => 0);
is($stdout, "1000|1000\n1000|2000", 'a session that gets no more goes on: nothing is lost, and it holds no lock');
like($stderr, qr/ERROR:  could not resize shared memory segment .*\nHINT:  Counts are kept in dynamic shared memory, of which the system has less/,
	'no more memory from the system: an error with a hint');
$node->safe_psql($db, q{INSERT INTO hits SELECT 'held ' || g FROM generate_series(1, 1000) g});
is($node->safe_psql($db, q{SELECT count(*), sum(count) FROM hits}), '1000|3000', 'keys that are held are counted');
$node->safe_psql($db, 'TRUNCATE hits_bad');
is($node->safe_psql($db, qq{SELECT sb_drain('hits', '$patience')}), 't', 'and flushed');
is(stored_keys($node, 'hits'), '1000|3000', 'all of them');
has_not_crashed($node, 'no process crashed');
$node->stop;

done_testing();
