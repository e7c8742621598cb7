# The keys that stay when most are gone are moved together, so that the memory of
# the others goes back to the system: keys that wait, that fail, of buffers that
# are stopped, that a transaction has pinned; while sessions count, read and
# truncate.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(usleep);
use WasteTest;

my $db = 'postgres';
my $keys = 300_000;
my $every = 300;
my $stay = $keys / $every;
my $node = new_node('main', 'dynamic_shared_memory_type = mmap', 'statbuffer.max_workers = 8',
	# who says so waits, when it commits, for a standby that there is not
	q{synchronous_standby_names = 'nobody'}, 'synchronous_commit = local', 'wal_level = replica', 'max_wal_senders = 2');

# What the server may have for what it holds; until it is so, something is done
# again and again.
sub memory_is_given_back
{
	my ($what, $meanwhile) = @_;
	my ($held, $size);

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		$held = sql('SELECT memory FROM sb_stat_memory');
		$size = shared_memory($node);
		last if $size <= 2 * $held + 16 * 1024 * 1024 && $size < 4 * 1024 * 1024 + 2 * $held;
		$meanwhile->();
		usleep(100_000);
	}
	cmp_ok($size, '<=', 2 * $held + 16 * 1024 * 1024, "$what: what the server has is in proportion to what is held");
	cmp_ok($size, '<=', 2 * $held + 4 * 1024 * 1024, "$what: and is no more than is needed at the least");
	cmp_ok(sql("SELECT coalesce(mapped, 0) FROM sb_stat_memory"), '<=', $size, "$what: and the view agrees");
	note "$what: $held bytes held, $size in segments";
	return;
}

# Keys of which most will be gone, and others among them that will stay.
my @others = qw(failing halted quiet);
make_summing_buffer($node, 'big', q{interval '1h', timeout '2s', batch_size '100000'});
make_buffer($node, $db, $_, q{interval '1h', timeout '200ms', backoff '1h', shutdown '0'}) foreach @others, 'cut';
sql(q{
	CREATE PROCEDURE fill(round int) LANGUAGE plpgsql AS $$
	BEGIN
		FOR i IN 1 .. 10 LOOP
			INSERT INTO big SELECT 'key ' || g FROM generate_series(30000 * i - 29999, 30000 * i) g;
			PERFORM sb_increment(round || '/' || i, 1, 'failing'), sb_increment(round || '/' || i, 1, 'halted'),
				sb_increment(round || '/' || i, 1, 'quiet');
			COMMIT;
		END LOOP;
	END $$;
	INSERT INTO failing_bad SELECT r || '/' || i FROM generate_series(1, 2) r, generate_series(1, 10) i;
	INSERT INTO halted_bad TABLE failing_bad;
});

# Flush them, and count anew what is to stay.
sub let_most_go
{
	sql(qq{
		SELECT sb_drain('big', '$patience');
		INSERT INTO big SELECT 'key ' || g * $every FROM generate_series(1, $stay) g;
	});
	wait_for($node, $db, qq{SELECT keys <= $stay FROM sb_stat_buffers WHERE buffer = 'big'}, 'most keys are gone');
	return;
}

# --- while nothing else happens -----------------------------------------------

sql('CALL fill(1)');
my $full = shared_memory($node);
cmp_ok($full, '>', 24 * 1024 * 1024, 'memory is used');
sql(q{SELECT sb_flush_all('failing')});
wait_for($node, $db, q{SELECT failures >= 10 FROM sb_stat_buffers WHERE buffer = 'failing'}, 'some keys fail');
sql(q{SELECT sb_stop('halted')});

# A session remembers where the counter is that it has counted in last.  On a
# slow machine all may have moved before it counts again.
my $session = $node->background_psql($db);
my $more = 0;
$session->query_safe("SELECT sb_increment('key $every', 1, 'big')");

# Another has looked at all of them, and does nothing more: the memory that it has
# mapped is not kept for that.
my $idle = $node->background_psql($db);
is($idle->query_safe('SELECT count(*) FROM big'), $keys, 'a session reads all');
let_most_go();
memory_is_given_back('at rest', sub
	{
		$session->query_safe("SELECT sb_increment('key $every', 1, 'big')");
		$more++;
	});
$session->query_safe("SELECT sb_increment('key $every', 1, 'big')");
$more++;
$session->quit;
is($idle->query_safe('SELECT count(*) FROM big'), $stay, 'the session that was idle reads what has stayed');
$idle->quit;
is(sql(q{SELECT count(*), sum(count) FROM big}), $stay . '|' . ($stay + $more), 'the keys that stayed are there');
is(sql(qq{SELECT count(*), sum(count), min(key), max(key) FROM $_}), '10|10|1/1|1/9', "so are those of the buffer that is $_") foreach @others;
is(sql(q{SELECT sum(sb_count('key ' || g, 'big')) FROM generate_series(1, 1000) g}), 3 + $more, 'and each is found');

# --- while sessions count, read and truncate ----------------------------------

# What is committed is counted, and nothing else; a scan returns each key once;
# and what does not change is read as it is.
sql(q{
	CREATE TABLE ledger (n bigint);
	CREATE PROCEDURE look() LANGUAGE plpgsql AS $$
	DECLARE
		n bigint;
		different bigint;
	BEGIN
		SELECT count(*), count(DISTINCT key) INTO n, different FROM big;
		IF n <> different THEN
			RAISE 'one of % keys is returned twice', n;
		END IF;
		SELECT sum(sb_count('1/' || i, 'failing') + sb_count('1/' || i, 'halted') + sb_count('1/' || i, 'quiet'))
			INTO n FROM generate_series(1, 10) i;
		IF n IS DISTINCT FROM 30 THEN
			RAISE 'what should be 30 is %', n;
		END IF;
		COMMIT;
	END $$;
	SELECT sb_start('halted');
});
my $count = qq{
\\set key $every * random(1, $stay)
BEGIN;
SELECT sb_increment('key ' || :key, 1, 'big'), sb_increment('key ' || :key, 1, 'quiet');
INSERT INTO ledger VALUES (1);
COMMIT;
};
my @loads = (
	start_load($node, $count, '-c', 3, '-T', 3600, '-R', 300),
	start_load($node, 'CALL look();', '-T', 3600, '-R', 20),
	start_load($node, q{INSERT INTO cut SELECT g FROM generate_series(1, 100) g; TRUNCATE cut;}, '-T', 3600, '-R', 20));

# A transaction that has pinned its keys and waits keeps these where they are, and
# so what is around them.
sql('CALL fill(2)');
my $pinned = start_session($node, $db, q{
	SET synchronous_commit = on;
	INSERT INTO ledger VALUES (0);
	SELECT sb_increment('2/' || i, 1, 'quiet') FROM generate_series(1, 2) i});
wait_for_session($pinned, q{a.wait_event = 'SyncRep'}, 'a transaction that commits has pinned keys');
is(sql(q{SELECT count(*) FROM quiet WHERE key LIKE '2/%'}), 10, 'which are there');
my %segments;
$segments{$_} = 1 foreach glob $node->data_dir . '/pg_dynshmem/*';
let_most_go();
my @new;
for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
{
	last if @new = grep { !$segments{$_} } glob $node->data_dir . '/pg_dynshmem/*';
	usleep(100_000);
}
isnt(@new, 0, 'memory is made to which others are moved');

# Who moves them is terminated; others go on.
sql(q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type IN ('statbuffer launcher', 'statbuffer worker')});
$node->append_conf('postgresql.conf', q{synchronous_standby_names = ''});
$node->reload;
finish_session($pinned, 'the transaction ends');
memory_is_given_back('while sessions work, and after keys were pinned', sub { });

sql(q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'load'});
foreach my $load (@loads)
{
	$load->{run}->finish;
	unlike($load->{err}, qr/returned twice|should be 30|ERROR:/, 'nobody has seen anything wrong');
}
my $counted = sql(q{SELECT sum(n) FROM ledger});
cmp_ok($counted, '>', 100, 'there was something to see');
sql(q{DELETE FROM failing_bad; DELETE FROM halted_bad});
is(sql("SELECT sb_drain('$_', '$patience')"), 't', "what is in the buffer $_ is stored") foreach 'big', @others;
is(sql('SELECT sum(sum) FROM big_stored'), 2 * $keys + 2 * $stay + 1 + $more + $counted, 'each count was stored once');
is(stored($node, $db, $_), 20, "those of the buffer $_, too") foreach qw(failing halted);
is(stored($node, $db, 'quiet'), 20 + 2 + $counted, 'those of the buffer quiet, too');
like(sql(q{SELECT count(*) FROM cut}), qr/^(0|100)$/, 'what was truncated is gone, but for what its session could not truncate any more');

has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
