//! A real Chromium, driven through chromedriver.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use thirtyfour::{ChromiumLikeCapabilities, DesiredCapabilities, WebDriver};

const CHROMEDRIVER: &str = "/usr/bin/chromedriver";
const CHROMIUM: &str = "/usr/bin/chromium";

/// How long a page may take for anything, on a machine that is busy with much else.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Browser {
    driver: WebDriver,
    _process: Process,
    _profile: tempfile::TempDir,
}

/// The running chromedriver. It takes its browsers with it, also when a test fails.
struct Process {
    child: Child,
    port: u16,
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(mut socket) = TcpStream::connect(("127.0.0.1", self.port)) {
            let request = b"GET /shutdown HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
            drop(socket.write_all(request));
            drop(std::io::copy(&mut socket, &mut std::io::sink()));
        } else {
            drop(self.child.kill());
        }
        drop(self.child.wait());
    }
}

impl Process {
    /// chromedriver would choose a port that is free by IPv6, and leave when another process, such as the server of
    /// another test, has the same one by IPv4. So it gets one that is free by IPv4, and is started again if it leaves.
    fn start() -> Self {
        let mut said = String::new();
        for _ in 0..20 {
            match Self::try_start() {
                Ok(process) => return process,
                Err(output) => said = output,
            }
        }
        panic!("chromedriver does not start; what it says:\n{said}");
    }

    /// # Errors
    ///
    /// What chromedriver printed before it left.
    fn try_start() -> Result<Self, String> {
        let (output, printer) = std::io::pipe().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut child = Command::new(CHROMEDRIVER)
            .arg(format!("--port={port}"))
            .stdout(printer.try_clone().unwrap())
            .stderr(printer)
            .spawn()
            .unwrap_or_else(|error| panic!("{CHROMEDRIVER} (Debian's chromium-driver) is needed: {error}"));
        let mut output = BufReader::new(output);
        let mut said = String::new();
        for line in output.by_ref().lines() {
            let line = line.expect("chromedriver prints text");
            if line.contains("started successfully") {
                // It must never find its output closed.
                std::thread::spawn(move || drop(std::io::copy(&mut output, &mut std::io::sink())));
                return Ok(Self { child, port });
            }
            said += &line;
            said.push('\n');
        }
        child.wait().unwrap();
        Err(said)
    }
}

impl Browser {
    pub(crate) async fn start() -> Self {
        let process = Process::start();
        let profile = tempfile::tempdir().unwrap();
        let mut capabilities = DesiredCapabilities::chrome();
        capabilities.set_binary(CHROMIUM).unwrap();
        let user_data = format!("--user-data-dir={}", profile.path().display());
        for argument in [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=1360,860",
            &user_data,
        ] {
            capabilities.add_arg(argument).unwrap();
        }
        let url = format!("http://127.0.0.1:{}", process.port);
        let driver = WebDriver::new(url, capabilities).await.expect("chromium starts");
        Self { driver, _process: process, _profile: profile }
    }

    pub(crate) async fn goto(&self, url: &str) {
        self.driver.goto(url).await.unwrap();
    }

    /// What an expression in the page is.
    pub(crate) async fn eval<T: DeserializeOwned>(&self, expression: &str) -> T {
        let script = format!("return {expression};");
        self.driver.execute(script, Vec::new()).await.unwrap().convert().unwrap()
    }

    /// Waits until what an expression in the page is passes; gives it.
    pub(crate) async fn until<T: DeserializeOwned + std::fmt::Debug>(
        &self,
        expression: &str,
        passes: impl Fn(&T) -> bool,
    ) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let value = self.eval(expression).await;
            if passes(&value) {
                return value;
            }
            if Instant::now() > deadline {
                let page: String = self.eval("document.body.innerText").await;
                panic!("{expression} stays {value:?}; the page:\n{page}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Clicks what a selector finds, when it is there.
    pub(crate) async fn click(&self, selector: &str) {
        let find = format!("document.querySelector({selector:?})");
        self.until::<bool>(&format!("{find} !== null"), |there| *there).await;
        self.eval::<()>(&format!("({find}.click(), undefined)")).await;
    }

    pub(crate) async fn quit(self) {
        self.driver.quit().await.unwrap();
    }
}
