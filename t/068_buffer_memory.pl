# A buffer's own bound of memory: max_memory.

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
my $node = new_node('main');
my $full = qr/ERROR:  53200: out of memory for keys of buffer "stuck"\nDETAIL:  All memory that the buffer's option "max_memory" allows is in use\.\nHINT:  You might need to increase the option "max_memory" with ALTER FOREIGN TABLE\./;

sub memory_of
{
	my ($name) = @_;

	return $node->safe_psql($db, "SELECT memory FROM sb_stat_buffers WHERE relid = '$name'::regclass");
}

# Run a statement, and return its error with the SQLSTATE.
sub verbose_error_of
{
	my ($sql) = @_;
	my (undef, undef, $stderr) = $node->psql($db, "\\set VERBOSITY verbose\n$sql");

	return $stderr;
}

# --- early flushes ----------------------------------------------------------

# Keys that are not due for an hour, many times more of them than the buffer may
# have, at a pace that a worker can follow: none is refused.  Memory for all
# buffers is far from short.
make_summing_buffer($node, 'early', q{interval '1h', max_memory '1MB', timeout '1h', batch_size '5000'});
foreach my $i (1 .. 40)
{
	$node->safe_psql($db, "INSERT INTO early SELECT '$i ' || g FROM generate_series(1, 1000) g");
	$node->poll_query_until($db, q{SELECT memory <= 5 * 1024 * 1024 / 8 FROM sb_stat_buffers WHERE buffer = 'early'})
	  or die 'memory does not get free';
}
pass('keys are flushed early and freed near the bound');
cmp_ok((split /\|/, stored_keys($node, 'early'))[0], '>', 30_000, 'most of them');
is($node->safe_psql($db, "SELECT sb_drain('early', '$patience')"), 't', 'the rest is drained');
is(stored_keys($node, 'early'), '40000|40000', 'each key was stored once');

# --- the bound --------------------------------------------------------------

# When they cannot be flushed, there is an end.
make_summing_buffer($node, 'stuck', q{interval '1h', max_memory '1MB', timeout '100ms', backoff '100ms'});
make_summing_buffer($node, 'other', q{interval '1h', timeout '100ms'});
$node->safe_psql($db, q{INSERT INTO stuck_bad VALUES ('not now'); INSERT INTO other_bad VALUES ('not now')});
$node->safe_psql($db, q{INSERT INTO stuck SELECT 'held ' || g FROM generate_series(1, 2000) g});
like(verbose_error_of(q{
	BEGIN;
	SELECT sb_increment('held 1', 1000000, 'stuck');
	SELECT sb_increment('key', 1, 'other');
	INSERT INTO stuck SELECT 'new ' || g FROM generate_series(1, 20000) g;
	COMMIT}), $full, 'at the bound new keys are an error');
is($node->safe_psql($db, q{SELECT count(*), sum(count) FROM stuck}), '2000|2000', 'nothing of the transaction has been counted');
is($node->safe_psql($db, q{SELECT count(*) FROM other}), '0', 'neither in another buffer');
wait_for($node, $db, q{SELECT keys = 2000 FROM sb_stat_buffers WHERE buffer = 'stuck'},
	'what it had made for nothing is given back');

$node->safe_psql($db, q{
	BEGIN;
	INSERT INTO stuck SELECT 'new ' || g FROM generate_series(1, 20000) g;
	ROLLBACK});
is($node->safe_psql($db, q{SELECT keys FROM sb_stat_buffers WHERE buffer = 'stuck'}), '2000',
	'what is rolled back needs no room');

# Fill it up to the last key.
fill_buffer($node, 'stuck', 'more');
my $held = $node->safe_psql($db, q{SELECT count(*) FROM stuck});
# what the buffer takes itself is shown, too
cmp_ok(memory_of('stuck'), '<=', 1024 * 1024 + 16384, 'the bound holds');
cmp_ok(memory_of('stuck'), '>', 1024 * 1024 - 200, 'and is made use of');

# Each way to count a new key.
$node->safe_psql($db, q{
	CREATE TABLE counted (key text);
	CREATE TRIGGER count AFTER INSERT ON counted FOR EACH ROW EXECUTE FUNCTION sb_trigger('stuck', 'key')});
foreach my $sql (
	q{SELECT sb_increment('one more', 1, 'stuck')},
	q{SELECT sb_async_increment('one more', 1, 'stuck')},
	q{SELECT sb_async_increment('one more', 1::bigint << 50, 'stuck')},
	q{INSERT INTO stuck VALUES ('one more')},
	q{INSERT INTO counted VALUES ('one more')})
{
	like(verbose_error_of($sql), $full, $sql);
}
is($node->safe_psql($db, q{SELECT count(*) FROM counted}), '0', 'the row is not there either');

# Held keys, and other buffers.
$node->safe_psql($db, q{INSERT INTO stuck SELECT 'held ' || g FROM generate_series(1, 2000) g});
$node->safe_psql($db, q{SELECT sb_async_increment('held 1', 1, 'stuck')});
is($node->safe_psql($db, q{SELECT count(*), sum(count) FROM stuck}), "$held|" . ($held + 2001),
	'at the bound keys that are held are counted');
$node->safe_psql($db, q{INSERT INTO other SELECT 'key ' || g FROM generate_series(1, 30000) g});
cmp_ok(memory_of('other'), '>', 1024 * 1024, 'another buffer counts more than that');
is($node->safe_psql($db, q{SELECT flushed_keys FROM sb_stat_buffers WHERE buffer = 'other'}), '0',
	'and is not flushed early');

# --- it is altered ----------------------------------------------------------

$node->safe_psql($db, q{ALTER FOREIGN TABLE stuck OPTIONS (SET max_memory '2MB')});
$node->safe_psql($db, qq{INSERT INTO stuck SELECT 'more ' || g FROM generate_series(100001, 101000) g});
$held += 1000;
cmp_ok(memory_of('stuck'), '>', 1024 * 1024, 'a bound that is raised is in force at once');
$node->safe_psql($db, q{ALTER FOREIGN TABLE stuck OPTIONS (SET max_memory '64kB')});
like(verbose_error_of(q{SELECT sb_increment('one more', 1, 'stuck')}), $full, 'so is one that is lowered');
$node->safe_psql($db, q{ALTER FOREIGN TABLE stuck OPTIONS (DROP max_memory)});
$node->safe_psql($db, q{SELECT sb_increment('more ' || g, 1, 'stuck') FROM generate_series(1, 20000) g});
is($node->safe_psql($db, q{SELECT count(*) FROM stuck}), 20000 + 2000 + 1000, 'and without one there is none');

# --- a restart --------------------------------------------------------------

# Saved counts beyond a bound that was lowered are all loaded.
my $sum = $node->safe_psql($db, q{SELECT sum(count) FROM stuck});
$node->safe_psql($db, q{ALTER FOREIGN TABLE stuck OPTIONS (ADD max_memory '100kB', SET backoff '1h')});
my $offset = -s $node->logfile;
$node->restart;
like(verbose_error_of(q{SELECT count(*) FROM stuck; SELECT sb_increment('one more', 1, 'stuck')}), $full,
	'the bound is in force after a restart');
is($node->safe_psql($db, q{SELECT count(*), sum(count) FROM stuck}), "23000|$sum", 'which has lost nothing');
is(lines_in_log($node, 'could not load all counts', $offset), 0, 'nor had to wait for anything');
$node->safe_psql($db, q{SELECT sb_increment('held 1', 1, 'stuck')});

# When it can be flushed, what is refused has it flushed, and there is room.
$node->safe_psql($db, q{TRUNCATE stuck_bad; TRUNCATE other_bad});
cmp_ok($node->safe_psql($db, "SELECT sb_flush_all('stuck')"), '>', 0, 'a flush');
wait_for($node, $db, q{SELECT pending = 0 AND in_flight = 0 FROM sb_stat_buffers WHERE buffer = 'stuck'}, 'all is stored');
is(stored_keys($node, 'stuck'), '23000|' . ($sum + 1), 'exactly');
$node->safe_psql($db, q{ALTER FOREIGN TABLE stuck OPTIONS (SET timeout '1h')});
for (my $i = 0; $i < 10 * $PostgreSQL::Test::Utils::timeout_default; $i++)
{
	last if ($node->psql($db, q{SELECT sb_increment('one more', 1, 'stuck')}))[0] == 0;
	usleep(100_000);
}
is($node->safe_psql($db, "SELECT sb_drain('stuck', '$patience')"), 't', 'it is drained');
is(stored_keys($node, 'stuck'), '23001|' . ($sum + 2), 'to the last one');

has_not_crashed($node, 'no process crashed');
$node->stop;

done_testing();
