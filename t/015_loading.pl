# What sessions see of counts that are being loaded after a start: what is loaded
# is read without waiting, counting goes on, and in the end every key is there
# once, with all of its counts, wherever loading was interrupted.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(time usleep);

my $db = 'postgres';
my $loading = qr/WARNING:  counts that were saved when the server was stopped are not loaded yet/;
my $node = new_node('loading', q{shared_preload_libraries = 'statbuffer'}, 'restart_after_crash = on',
	'wal_level = replica', 'max_wal_senders = 4');

# What a query returns, and its warnings, in a session of its own.
sub ask
{
	my ($query) = @_;
	my ($status, $out, $err) = $node->psql($db, $query);

	return ($out, $err);
}

sub launcher
{
	return (processes($node, 'statbuffer launcher'))[0];
}

# Restarts with room for a part of what buffers hold, and waits until that is
# loaded.
sub restart_with_little_memory
{
	my $offset = -s $node->logfile;

	$node->append_conf('postgresql.conf', "statbuffer.max_memory = '4MB'");
	$node->restart;
	$node->wait_for_log(qr/could not load all counts of the last shutdown yet: out of memory for statbuffer keys/, $offset);
	return;
}

# Some keys of "hits" that are loaded; the first one is that of a block which is
# loaded completely.
sub loaded_keys
{
	return split /\n/, sql(q{SELECT key FROM hits});
}

# No handler, so that what is held stays; and keys that are as long that some
# thousand of them fill the memory.
my $nkeys = 50_000;
sql(qq{
	CREATE FOREIGN TABLE hits (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'no_handler', interval '1h', shutdown '0');
	CREATE FOREIGN TABLE others (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'no_handler', interval '1h', shutdown '0');
	INSERT INTO hits SELECT g || repeat('x', 200), g FROM generate_series(1, $nkeys) g});
my $sum = $nkeys * ($nkeys + 1) / 2;

restart_with_little_memory();
my @loaded = loaded_keys();
my %is_loaded = map { $_ => 1 } @loaded;
cmp_ok(scalar @loaded, '>', 1000, 'a part of the keys is loaded');
cmp_ok(scalar @loaded, '<', $nkeys, 'and others are not');
my ($missing) = grep { !$is_loaded{$_} } map { $_ . 'x' x 200 } 1 .. $nkeys;
my ($count) = $loaded[0] =~ /^(\d+)x/;

my ($out, $err) = ask("SELECT sb_count('$loaded[0]', 'hits')");
is($out, $count, 'a key that is loaded is read');
is($err, '', 'without waiting for the others');
($out, $err) = ask("SELECT sb_count('$missing', 'hits')");
is($out, '', 'one that is not loaded yet is not there');
like($err, $loading, 'and a warning says that it may be still to come');
($out, $err) = ask("SELECT sb_count('new key', 'others'), (SELECT count(*) FROM others), state
	FROM sb_stat_buffers WHERE buffer = 'others'");
is($out, '|0|idle', 'a buffer of which nothing was saved is read');
is($err, '', 'without waiting for others');
($out, $err) = ask(q{SELECT pending > 0 FROM sb_stat_buffers WHERE buffer = 'hits'});
like($err, $loading, 'the sums of one that is being loaded wait');
like(error_of('TRUNCATE hits'), qr/ERROR:  cannot truncate buffer "hits" now/, 'TRUNCATE of one that is being loaded');
sql('TRUNCATE others');

# Counting does not wait, for keys that are loaded.
($out, $err) = ask("SELECT sb_increment('$loaded[0]', 1000000, 'hits')");
is($err, '', 'counting a key that is loaded');
is(sql("SELECT sb_count('$loaded[0]', 'hits')"), $count + 1_000_000, 'which is seen at once');

# Another launcher goes on where the first one has stopped, in the middle of a
# block.
my $pid = launcher();
sql("SELECT pg_terminate_backend($pid)");
wait_for($node, $db, qq{
		SELECT count(*) = 1 FROM pg_stat_activity
		WHERE backend_type = 'statbuffer launcher' AND pid <> $pid}, 'the launcher is another one');
$node->append_conf('postgresql.conf', "statbuffer.max_memory = '1GB'");
$node->reload;
is(sql('SELECT count(*), sum(count) FROM hits'), "$nkeys|" . ($sum + 1_000_000), 'it loads the rest, and each key once');
is(sql("SELECT pending, keys FROM sb_stat_buffers WHERE buffer = 'hits'"), ($sum + 1_000_000) . "|$nkeys",
	'and the sums are right');

# What is in memory and what is still in the file are saved together, and loaded
# from one file; the buffer has two sections in it.
restart_with_little_memory();
restart_with_little_memory();
$node->append_conf('postgresql.conf', "statbuffer.max_memory = '1GB'");
$node->restart;
is(sql("SELECT sb_count('$missing', 'hits')"), $missing =~ /^(\d+)x/ ? $1 : '', 'a key is read when it is loaded');
is(sql('SELECT count(*), sum(count) FROM hits'), "$nkeys|" . ($sum + 1_000_000), 'saved before it was loaded, and each key is there once');

# A crash in the middle: what was in the file is lost, and does not come back.
restart_with_little_memory();
my $offset = -s $node->logfile;
kill 'KILL', launcher();
$node->wait_for_log(qr/database system is ready to accept connections/, $offset);
is(sql('SELECT count(*) FROM hits'), '0', 'after a crash nothing is loaded');
is(join(' ', glob $node->data_dir . '/statbuffer*'), '', 'and there is no file');

# Sessions count the same keys and others while they are loaded.
$node->append_conf('postgresql.conf', "statbuffer.max_memory = '1GB'");
$node->reload;
my $many = sized(400_000, 2000);
sql("INSERT INTO hits SELECT 'key ' || g, 1 FROM generate_series(1, $many) g");
foreach my $round (1 .. 2)
{
	$node->stop;
	$node->start;
	my $session = start_session($node, $db,
		map { "INSERT INTO hits SELECT 'key ' || g, 1 FROM generate_series($_, $many + 1000, 10) g" } 1 .. 10);
	my $launcher = launcher();

	# it may hold a lock that the session waits for
	for (1 .. 10)
	{
		kill 'STOP', $launcher;
		usleep(20_000);
		kill 'CONT', $launcher;
		usleep(5_000);
	}
	finish_session($session, "counted meanwhile ($round)");
	is(sql(q{SELECT count(*), sum(count) FROM hits}), ($many + 1000) . '|' . ($many + $round * ($many + 1000)),
		"each key is there once, with all of its counts ($round)");
	is(sql(q{SELECT keys, pending FROM sb_stat_buffers WHERE buffer = 'hits'}),
		($many + 1000) . '|' . ($many + $round * ($many + 1000)), "and the sums are right ($round)");
}

# All of them are flushed when there is a handler: none is missing in the
# schedule.
sql(q{
	CREATE TABLE stored (key text, count bigint);
	CREATE FUNCTION store(keys text[], counts bigint[]) RETURNS void LANGUAGE sql
	AS 'INSERT INTO stored SELECT * FROM unnest(keys, counts)';
	ALTER FOREIGN TABLE hits OPTIONS (SET handler 'store', ADD batch_size '10000')});
$node->restart;
is(sql(qq{SELECT sb_drain('hits', '$patience')}), 't', 'what was loaded is flushed');
is(sql('SELECT count(DISTINCT key), sum(count) FROM stored'), ($many + 1000) . '|' . (3 * $many + 2000), 'all of it');

# A transaction is about to commit when counts are saved: saving waits for it, and
# what it has counted is saved, too.  It waits for a standby that does not exist,
# over a connection that is not ended before counts are saved.
sql(q{
	TRUNCATE stored;
	ALTER FOREIGN TABLE hits OPTIONS (SET handler 'no_handler')});
sql("INSERT INTO hits SELECT 'key ' || g, 1 FROM generate_series(1, 1000) g");
$node->append_conf('postgresql.conf', "synchronous_standby_names = 'nobody'");
$node->reload;
my ($result, $errors) = ('', '');
my $commit = IPC::Run::start(
	[
		$node->installed_command('psql'), '-XqAt', '-d', $node->connstr($db) . ' replication=database',
		'-c', q{INSERT INTO stored VALUES ('committed', 1); SELECT sb_increment('key 7', 7, 'hits')}
	],
	'<' => \undef, '>' => \$result, '2>' => \$errors);
wait_for($node, $db, q{SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'}, 'a transaction commits');
$pid = sql(q{SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'});
my $file = $node->data_dir . '/statbuffer.saved';
$node->command_ok([ 'pg_ctl', '-D', $node->data_dir, '-m', 'fast', '-W', 'stop' ], 'the server is told to stop');
usleep(2_000_000);
ok(!-e $file, 'nothing is saved meanwhile');
kill 'INT', $pid;
$node->stop('fast', fail_ok => 1);
$commit->finish;
ok(-e $file, 'counts are saved when it has committed');
$node->append_conf('postgresql.conf', "synchronous_standby_names = ''");
$node->start;
is(sql(q{SELECT count(*), sum(count), sb_count('key 7', 'hits'), (SELECT count(*) FROM stored) FROM hits}),
	'1000|1007|8|1', 'with what it has counted');
$node->stop;

done_testing();
