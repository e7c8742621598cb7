# Durable buffers under load and crashes: sessions count in every way, in
# transactions that write the same into a table, the book, or prepare both; some
# roll back.  Handlers fail, buffers are truncated, altered and switched off and on,
# the ledger is rotated, and processes are killed all the time, and so is the server.
# After it, and in the end, what is stored and held of each key must be what the
# book has: see CrashesWorld.pm.
#
# With a standby, that is promoted at times, and the old primary is rewound, and
# becomes its standby.
#
# This is the short run.  dev/chaos --durable runs it for as long as one likes, with
# these in the environment, each prefixed STATBUFFER_CRASHES_:
#
#	ROUNDS		how many crashes at least
#	SECONDS		and how long
#	SEED		which ones; not all comes again in the same order
#	PRELOAD		yes or no, or nothing: as it comes at each start
#	RATE		how many transactions a second; 0 for as many as can be
#	STANDBY		yes, if there is one
#	REPORT		a file to write the figures to

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin, "$FindBin::RealBin/..";

use CrashesWorld;
use File::Copy;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(time usleep);

sub parameter
{
	my ($name, $default) = @_;
	my $value = $ENV{"STATBUFFER_CRASHES_$name"};

	return defined $value && $value ne '' ? $value : $default;
}

my $rounds = parameter('ROUNDS', 8);
my $seconds = parameter('SECONDS', 0);
my $seed = parameter('SEED', int time);
my $preload = parameter('PRELOAD', '');
my $rate = parameter('RATE', 300);
my $has_standby = parameter('STANDBY', 'no') eq 'yes';
my $report = parameter('REPORT', '');
my $db = 'postgres';

srand $seed;
note("$rounds rounds, $seconds seconds, STATBUFFER_CRASHES_SEED=$seed");

my $started = time;
my %done = map { $_ => 0 } ('crashes', 'reckonings', 'rotations', 'prepared transactions ended after a crash');
my $keys_off = 0;

# The primary, and what is its standby.
my ($node, $standby);

my $diary_file = "$PostgreSQL::Test::Utils::log_path/092_crashes_events.log";
open(my $diary, '>', $diary_file) or die "$diary_file: $!";
$diary->autoflush(1);

sub record
{
	my ($what) = @_;

	printf $diary "%8.3f %s\n", time - $started, $what;
	return;
}

# --- servers ------------------------------------------------------------------

# What differs from start to start.  Does the server come back by itself if a
# process is killed?
my %comes_back;

sub write_settings
{
	my ($server) = @_;
	my $is_preloaded = $preload eq 'yes' || $preload ne 'no' && rand() < 0.7;

	$comes_back{ $server->name } = rand() < 0.6;

	# also for pg_rewind, beside the file that it is told to use
	foreach my $dir ($server->data_dir, $server->basedir)
	{
		open(my $conf, '>', "$dir/crashes.conf") or die "$dir/crashes.conf: $!";
		print $conf "shared_preload_libraries = 'statbuffer'\n" if $is_preloaded;
		print $conf 'restart_after_crash = ' . ($comes_back{ $server->name } ? 'on' : 'off') . "\n";
		close $conf;
	}
	record($server->name . ': start, ' . ($is_preloaded ? 'preloaded' : 'not preloaded'));
	return;
}

sub start_server
{
	my ($server) = @_;

	write_settings($server);
	$server->start;
	return;
}

# Kills the postmaster, and waits until the others are gone.
sub kill_postmaster
{
	my ($server) = @_;
	my ($postmaster) = split /\n/, slurp_file($server->data_dir . '/postmaster.pid');
	my @processes = ($postmaster);

	foreach my $file (glob '/proc/[0-9]*/stat')
	{
		open(my $in, '<', $file) or next;
		my $stat = <$in> // '';
		push @processes, $1 if $stat =~ /^(\d+) \(.*\) \S (\d+) /s && $2 == $postmaster;
	}
	$server->kill9;
	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		return if !kill 0, @processes;
		usleep(20_000);
	}
	BAIL_OUT('processes are left when the postmaster is killed');
	return;
}

# The old primary becomes the standby of the new one.  What it has and the other one
# has not is undone.
sub rejoin
{
	my ($old, $new) = @_;

	# up to 15 pg_rewind finds the timeline of a server that was promoted only
	# after a checkpoint
	$new->safe_psql($db, 'CHECKPOINT');
	my ($out, $err) = run_command([
		'pg_rewind', '--no-sync', '-D', $old->data_dir,
		'--source-server', $new->connstr($db),
		'--config-file', $old->basedir . '/postgresql.conf' ]);
	record("pg_rewind: $err");
	BAIL_OUT("pg_rewind fails: $err") if $err !~ /Done!|no rewind required/;
	copy($old->basedir . '/postgresql.conf', $old->data_dir . '/postgresql.conf');
	$old->enable_streaming($new);
	$old->set_standby_mode;
	start_server($old);
	return;
}

# --- the load -----------------------------------------------------------------

my $load;

# Sessions that count, until the server goes away.  Is something left prepared?
sub begin_load
{
	my $open = rand() < 0.5 ? (qw(hits handled rare))[ int rand 3 ] : undef;
	my @command = (
		$node->installed_command('pgbench'), '-n',
		'-c', 5, '-j', 5, '-T', 3600, '--random-seed', int rand 1e9);

	push @command, '-R', $rate if $rate;

	foreach my $script (script_weights($open))
	{
		my ($name, $weight, $text) = @$script;
		my $file = "$PostgreSQL::Test::Utils::tmp_check/crashes_$name.sql";

		append_to_file($file, $text) if !-e $file;
		push @command, '-f', "$file\@$weight";
	}
	record('load' . ($open ? ", with transactions on $open that are left prepared" : ''));
	$load = { out => '', err => '' };
	$load->{run} = IPC::Run::start([ @command, $node->connstr($db) . ' application_name=load' ],
		'<' => \undef, '>' => \$load->{out}, '2>' => \$load->{err});
	return;
}

# Its errors must be of those that we have made.
my @complaints;

sub finish_load
{
	$load->{run}->signal('TERM');
	$load->{run}->finish;
	push @complaints, grep {
		/(?:ERROR|PANIC):/
		  && !/canceling statement due to|terminating connection|out of|maximum number of prepared|cannot PREPARE a transaction that has incremented/
	} split /\n/, $load->{err};
	return;
}

# Something else than a crash.
my $ledgers = '';

sub disturb
{
	my ($what, $statements, $then) = random_disturbance();
	my $files = q{SELECT 'ledgers ' || pg_relation_filenode('sb_ledger_0') || ' ' || pg_relation_filenode('sb_ledger_1')};
	my ($status, $out, $err) =
	  $node->psql($db, "$files;\nSET lock_timeout = '300ms';\n$statements", on_error_stop => 1);

	if (defined $then && $status == 0)
	{
		# without it, a crash would lose counts
		for my $attempt (1 .. 600)
		{
			last if $node->psql($db, "SET lock_timeout = '300ms';\n$then", on_error_stop => 1) == 0;
			BAIL_OUT("cannot do: $then") if $attempt == 600;
			usleep(50_000);
		}
	}
	$done{ $status == 0 ? $what : "$what (refused)" }++;
	$err = ($err // '') =~ s/^psql:\S+ //r =~ s/\n.*//sr;
	record("$what: " . ($statements =~ s/\s+/ /gr) . ($err ne '' ? " -- $err" : ''));
	if ($out =~ /^ledgers (.*)/m && $1 ne $ledgers)
	{
		$done{rotations}++ if $ledgers ne '';
		$ledgers = $1;
	}
	return;
}

# --- crashes ------------------------------------------------------------------

my %victims = (
	'a session' => q{backend_type = 'client backend' AND application_name = 'load'},
	'a worker' => q{backend_type = 'statbuffer worker' AND query !~ 'ledger|prepared transactions'},
	'a keeper' => q{backend_type = 'statbuffer worker' AND query ~ 'ledger|prepared transactions'},
	'the launcher' => q{backend_type = 'statbuffer launcher'},
	'the checkpointer' => q{backend_type = 'checkpointer'});

# Kills a process.  Returns false if there is none.
sub kill_one
{
	my ($whom) = @_;
	my $pid = '';

	# a keeper is there for moments
	for (1 .. ($whom eq 'a keeper' ? 100 : 1))
	{
		$pid = ($node->psql($db,
			"SELECT pid FROM pg_stat_activity WHERE $victims{$whom} ORDER BY random() LIMIT 1"))[1] // '';
		last if $pid =~ /^\d+$/;
		usleep(10_000);
	}
	return $pid =~ /^\d+$/ && kill('KILL', $pid);
}

# Ends the server, or one of its processes, without a warning, and has it start.
sub crash
{
	my $draw = rand();
	my $how = $draw < 0.25 ? 'immediate shutdown'
	  : $draw < 0.45 ? 'the postmaster'
	  : (sort keys %victims)[ int rand keys %victims ];
	my $offset = -s $node->logfile;

	if (exists $victims{$how} && !kill_one($how))
	{
		$how = 'immediate shutdown';
	}
	elsif (exists $victims{$how} && $comes_back{ $node->name })
	{
		record("crash: $how was killed");
		for (1 .. 600)
		{
			last if slurp_file($node->logfile, $offset) =~ /was terminated by signal 9/;
			usleep(50_000);
		}
		$node->poll_query_until($db, 'SELECT true') or BAIL_OUT('the server does not come back');
	}
	elsif (exists $victims{$how})
	{
		record("crash: $how was killed, and the server does not come back");
		for (1 .. 600)
		{
			last if !-e $node->data_dir . '/postmaster.pid';
			usleep(50_000);
		}
		$node->stop('immediate', fail_ok => 1);
		start_server($node);
	}
	elsif ($how eq 'the postmaster')
	{
		record('crash: the postmaster was killed');
		kill_postmaster($node);
		start_server($node);
	}
	if ($how eq 'immediate shutdown')
	{
		record('crash: immediate shutdown');
		$node->stop('immediate', fail_ok => 1);
		start_server($node);
	}
	$done{crashes}++;
	$done{"crashes: $how"}++;
	return;
}

# The standby takes over.
sub fail_over
{
	my $how = (qw(planned immediate kill kill))[ int rand 4 ];

	record('promotion of ' . $standby->name . ": $how");
	if ($how eq 'planned')
	{
		$node->stop('fast', fail_ok => 1);
	}
	elsif ($how eq 'immediate')
	{
		$node->stop('immediate', fail_ok => 1);
	}
	else
	{
		kill_postmaster($node);
	}
	$standby->promote;
	$standby->poll_query_until($db, 'SELECT NOT pg_is_in_recovery()') or BAIL_OUT('the standby is not promoted');
	($node, $standby) = ($standby, $node);
	$ledgers = '';

	# it may crash while it takes over
	crash() if rand() < 0.3;
	begin_load() if rand() < 0.5;
	my $counts = $load->{run}->pumpable;
	rejoin($standby, $node);
	finish_load() if $counts;
	$done{crashes}++;
	$done{"promotions: $how"}++;
	return;
}

# --- the reckoning --------------------------------------------------------------

sub end_prepared
{
	my ($probability) = @_;

	foreach my $name (split /\n/, $node->safe_psql($db, 'SELECT gid FROM pg_prepared_xacts'))
	{
		next if rand() >= $probability;
		$node->safe_psql($db, (rand() < 0.5 ? 'COMMIT' : 'ROLLBACK') . " PREPARED '$name'");
		$done{'prepared transactions ended after a crash'}++;
	}
	return;
}

sub compare
{
	my ($server, $when) = @_;
	my ($status, $off, $err);

	if ($server == $node)
	{
		($status, $off, $err) = $server->psql($db, off_locked_sql(),
			extra_params => ['--single-transaction'], on_error_stop => 1);
		BAIL_OUT("cannot look at the counts: $err") if $status != 0;
	}
	else
	{
		# until it does not conflict with what is replayed
		foreach my $attempt (1 .. 100)
		{
			($status, $off, $err) = $server->psql($db, off_sql(), on_error_stop => 1);
			last if $status == 0 && $off eq '';
			usleep(100_000);
		}
	}
	return if $status == 0 && $off eq '';
	$keys_off += () = $off =~ /^/gm;
	$keys_off ||= 1;
	record("OFF, $when:\n$off$err");
	fail("$when: every key is exact");
	diag(join("\n", grep { defined } (split /\n/, $off)[ 0 .. 19 ]), "\n$err", $server->safe_psql($db, 'TABLE sb_stat_buffers'));
	return;
}

# Nobody counts now: what each key has must be what is in the book.
sub reckon
{
	my ($when, $ends) = @_;

	# some of what was prepared stays so over the next crash
	end_prepared($ends // (0, 0.5, 1)[ int rand 3 ]);
	compare($node, $when);
	$node->safe_psql($db, sum_up_sql()) if !$keys_off;
	if ($standby)
	{
		$node->wait_for_catchup($standby);
		compare($standby, "$when, on the standby");
	}
	$done{reckonings}++;
	record("reckoning $when: " . ($keys_off ? 'OFF' : 'exact'));
	return;
}

# --- the story ------------------------------------------------------------------

$node = PostgreSQL::Test::Cluster->new($has_standby ? 'one' : 'crashes');
$node->init($has_standby ? (allows_streaming => 1) : ());
$node->append_conf('postgresql.conf', qq{
max_prepared_transactions = 200
max_worker_processes = 20
statbuffer.ledger_size = 1MB
checkpoint_timeout = 30s
shared_buffers = 64MB
deadlock_timeout = 200ms
wal_log_hints = on
log_line_prefix = '%m [%p] %b %q%a '
log_min_messages = warning
log_min_error_statement = panic
log_statement = none
log_min_duration_statement = 1s
include 'crashes.conf'
} . ($has_standby ? "wal_keep_size = 2GB\nhot_standby_feedback = on\n" : ''));
start_server($node);
$node->safe_psql($db, world_sql());
if ($has_standby)
{
	$node->backup('backup');
	$standby = PostgreSQL::Test::Cluster->new('two');
	$standby->init_from_backup($node, 'backup', has_streaming => 1);
	copy($_->data_dir . '/postgresql.conf', $_->basedir . '/postgresql.conf') foreach $node, $standby;
	start_server($standby);
}

my $next_note = time + 10;
while (!$keys_off && ($done{crashes} < $rounds || time < $started + $seconds))
{
	begin_load();
	for (1 .. 1 + int rand 4)
	{
		usleep(100_000 + int rand 400_000);
		disturb();
	}
	if ($standby && rand() < 0.3)
	{
		fail_over();
	}
	else
	{
		crash();
		finish_load();
	}

	# Again, before anybody has looked, and while counts are loaded
	while (rand() < 0.2)
	{
		usleep(int rand 300_000);
		crash();
	}
	reckon("after $done{crashes} crashes") if rand() < 0.8;
	$node->psql($db, 'VACUUM book') if rand() < 0.2;
	if (time >= $next_note)
	{
		record("so far: $done{crashes} crashes, $done{reckonings} reckonings, $keys_off keys off");
		$next_note = time + 10;
	}
}

if (!$keys_off)
{
	$node->safe_psql($db, 'UPDATE mood SET failing = 0');
	reckon('at the end', 1);
	foreach my $buffer (@buffers)
	{
		is($node->safe_psql($db, "SELECT sb_drain('$buffer', '180s')"), 't', "$buffer is drained");
	}
	is($node->safe_psql($db, held_sql()), 0, 'nothing is held');
	reckon('when all is stored');
	$node->stop('immediate');
	start_server($node);
	is($node->safe_psql($db, held_sql()), 0, 'after another crash, nothing comes back');
	reckon('after another crash');
}
is($keys_off, 0, 'every key is exact, each time');
is(join("\n", @complaints), '', 'no session met an error of its own');
foreach my $server (grep { defined } $node, $standby)
{
	is(join("\n", grep { /PANIC|TRAP|in the ledger|could not keep|terminated by signal (?!9\b)/ }
			  split /\n/, slurp_file($server->logfile)), '', $server->name . ': nothing else went wrong');
}

my ($increments, $entries) = split /\|/, $node->safe_psql($db,
	q{SELECT coalesce(sum(calls), 0), count(*) FROM (SELECT calls FROM book UNION ALL SELECT calls FROM books) AS b});
my @figures = (
	[ 'seconds', int(time - $started) ],
	[ 'seed', $seed ],
	[ 'increments reconciled', $increments ],
	[ 'in so many keys', $node->safe_psql($db, q{SELECT count(*) FROM books WHERE buffer NOT IN ('begun', 'ended', 'discarded')}) ],
	[ 'keys off', $keys_off ],
	[ 'handlers failed', $node->safe_psql($db, q{SELECT coalesce(pg_sequence_last_value('failed'), 0)}) ],
	map { [ $_, $done{$_} ] } sort keys %done);
my $table = join '', map { sprintf "%-52s %s\n", @$_ } @figures;

note($_) foreach split /\n/, $table;
append_to_file($report, $table) if $report;
cmp_ok($increments, '>', 1000, 'a lot was counted');
$_->stop('immediate', fail_ok => 1) foreach grep { defined } $standby, $node;
done_testing();
